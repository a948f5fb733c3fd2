"""Learns a model by running three tokens through it: which layers a text goes through, how each calls attention, and
which tensors no text ever needs: those of a wrapper's towers for images and sounds, and of layers that look at them.

The weights are zeros in memory that is never written and so takes no RAM.

Shapes as in attention_call.py.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import greenlet
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flexgen_lite.model.spec import STATE_ALIGNMENT, AttentionSpec, StateSpec
from flexgen_lite.workers.compute import mixers
from flexgen_lite.workers.compute.attention_call import AttentionCall, ModelGreenlet
from flexgen_lite.workers.compute.indexers import choose_all
from flexgen_lite.workers.compute.latents import hand_over
from flexgen_lite.workers.compute.live_bytes import LiveBytes
from flexgen_lite.workers.compute.mixers import MOST_ROWS, NOTHING, Key, Mixer, StateSpan
from flexgen_lite.workers.compute.model_inputs import model_inputs
from flexgen_lite.workers.model.builder import decoder_layers, decoder_of, no_interface, text_config
from flexgen_lite.workers.serve import UserError, first_line

NUM_TOKENS = 3
LINEAR = (nn.Linear, Conv1D)
NO_ATTENTION = AttentionSpec(1, 1, 16, 16, 1.0, None, None, False)
_StorageRef = weakref.ref[torch.UntypedStorage]


@dataclass(frozen=True, slots=True)
class TextPath:
    """What a text goes through.

    Attributes:
        layers: the decoder layers that it enters, in order.
        columns: the layer of each attention call.
        attention: each of these calls.
        kv_columns: the call whose keys and values each reads: itself, or one before it.
        unused: names of the tensors that it does not need; the model has them no more.
        projections: of each column, the linear layers of what calls attention that are called before it does.
        stops: columns that are no attention calls; `attention` and `kv_columns` have those of another one for them.
        states: that a sequence keeps beside keys and values.
        has_indexers: whether there are layers whose tokens see those that an indexer chooses.
        held_bytes: that a token has, at most, while its attention is computed elsewhere.
        pass_bytes: that a token has, at most, on its way through a layer, without mixers that get a few rows at once.
        mix_bytes: that a mixer takes for a prompt's rows, as many as it gets at once.
    """

    layers: tuple[nn.Module, ...]
    columns: tuple[int, ...]
    attention: tuple[AttentionSpec, ...]
    kv_columns: tuple[int, ...]
    projections: tuple[tuple[nn.Module, ...], ...]
    stops: tuple[int, ...]
    states: tuple[StateSpec, ...]
    unused: frozenset[str]
    has_indexers: bool
    held_bytes: int
    pass_bytes: int
    mix_bytes: int


class _LayerLeft(BaseException):
    """Leaves a decoder layer at its last attention call: there is nothing to learn behind it."""


class _Trial(ModelGreenlet):
    """Runs the first layer of each structure to its end, to see how often it calls attention, others up to their last
    call."""

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, has_mixers: bool) -> None:
        super().__init__(self._run)
        self._model, self._all_layers = model, layers
        self.plain: list[nn.Module] = []  # layers without attention and mixer
        self.states: dict[Key, tuple[tuple[int, ...], torch.dtype]] = {}
        self.layers: list[nn.Module] = []
        self.columns: list[int] = []
        self.calls: list[AttentionSpec | None] = []  # None: a stop
        self.kv_columns: list[int] = []
        self.projections: list[tuple[nn.Module, ...]] = []
        self._called: list[nn.Module] = []  # linear layers, since the last column of the layer
        self._kv: dict[object, tuple[int, list[_StorageRef]]] = {}  # views -> the first call with them, while they live
        self._bytes = LiveBytes()
        self.held_bytes = self.pass_bytes = 0  # of all tokens
        self.mix_bytes = 0
        self.entered: set[nn.Module] = set()  # of the modules outside the layers
        self._num_calls: dict[object, int] = {}  # by structure
        self._plain: set[object] = set()  # structures
        self._has_mixers = has_mixers
        self._outputs: dict[object, Any] = {}  # by structure, of its first layer
        self._leave_after: int | None = None

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self._note(call.spec, self._kv_column(call), () if call.module is None else call.module.modules())
        query, latents = call.query_BHTD, call.latents
        _, heads, tokens, head_dim = query.shape
        value_dim = call.value_BGTE.shape[3] if latents is None else latents.value_dim(heads, head_dim)
        return query.new_zeros((1, tokens, heads, value_dim))

    def mix(self, mixer: Mixer, rows_1TD: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, peak, grown = self._bytes.live, self._bytes.peak, 0
        if mixer.goes_on and self._leave_after is None:  # the first layer of its structure
            self._bytes.peak = before
            self._mix(mixer, _longer(rows_1TD), tuple(map(_longer, args)), {n: _longer(v) for n, v in kwargs.items()})
            taken = self._bytes.peak - before
            if mixer.begins_whole:  # however long a prompt is
                grown = -(-taken * NUM_TOKENS // MOST_ROWS)
            else:
                self.mix_bytes = max(self.mix_bytes, taken)
        output = self._mix(mixer, rows_1TD, args, kwargs)
        if mixer.goes_on:
            self._bytes.peak = max(peak, self._bytes.live, before + grown)
        self.stop()
        return output

    def _mix(self, mixer: Mixer, rows_1TD: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return mixer.run(rows_1TD, [StateSpan(0, rows_1TD.shape[1], NOTHING, 0)], self, args, kwargs)

    def stop(self) -> None:
        self._note(None, NOTHING)

    def get(self, key: Key, places: Sequence[int]) -> torch.Tensor:
        raise AssertionError("there is no state before the first token")

    def put(self, key: Key, places: Sequence[int], values: torch.Tensor) -> None:
        self.states[key] = tuple(values.shape[1:]), values.dtype

    def _note(self, call: AttentionSpec | None, kv_column: int, within: Iterable[nn.Module] = ()) -> None:
        """A column. `within`: parts of what calls attention."""
        layer = len(self.layers) - 1
        if layer < 0:
            raise UserError(f"{type(self._model).__name__} attends before its first layer, which is not supported")
        self.columns.append(layer)
        self.kv_columns.append(kv_column)
        self.calls.append(call)
        parts, called, self._called = set(within), dict.fromkeys(self._called), []
        self.projections.append(tuple(module for module in called if module in parts))
        self.held_bytes = max(self.held_bytes, self._bytes.live)
        if self.columns.count(layer) == self._leave_after:
            raise _LayerLeft

    def _kv_column(self, call: AttentionCall) -> int:
        """The first call with the keys and values of this one."""
        views = call.key_BGTD, call.value_BGTE
        if call.latents is not None:
            views = call.latents.latent_B1TR, call.latents.rotary_B1TP
        storages = [view.untyped_storage() for view in views]
        place = (*map(id, storages), *((view.data_ptr(), view.shape, view.stride()) for view in views))
        known = self._kv.get(place)
        if known is None or any(ref() is None for ref in known[1]):
            known = self._kv[place] = len(self.calls), [weakref.ref(storage) for storage in storages]
        return known[0]

    def _run(self) -> None:
        with contextlib.ExitStack() as undo:
            for module in outside(self._model, self._all_layers):
                hook = module.register_forward_pre_hook(lambda module, _: self.entered.add(module))
                undo.callback(hook.remove)
            for module in (part for layer in self._all_layers for part in layer.modules() if type(part) in LINEAR):
                hook = module.register_forward_pre_hook(lambda module, _: self._called.append(module))
                undo.callback(hook.remove)
            for index, layer in enumerate(self._all_layers):
                undo.callback(setattr, layer, "forward", layer.forward)
                layer.forward = self._of_layer(index, layer)
            undo.callback(setattr, nn.Linear, "forward", nn.Linear.forward)
            nn.Linear.forward = _zero_product  # type: ignore[assignment]
            tokens, positions = torch.zeros((1, NUM_TOKENS), dtype=torch.long), torch.arange(NUM_TOKENS)[None]
            with self._bytes:
                self._model(**model_inputs(self._model, tokens, positions))

    def _may_be_plain(self, layer: nn.Module) -> bool:
        """Whether it is likely to have no attention at all, and not one that does not go through the interface."""
        names = [f"{name} {type(module).__name__}".lower() for name, module in layer.named_modules()]
        return self._has_mixers and not any("attn" in name or "attention" in name for name in names[1:])

    def _end_plain(self, layer: nn.Module) -> None:
        self.plain.append(layer)
        self._leave_after = None
        self.stop()

    def _of_layer(self, index: int, layer: nn.Module) -> Callable[..., torch.Tensor]:
        forward = layer.forward
        structure = type(layer), tuple((name, tuple(value.shape)) for name, value in layer.named_parameters())

        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if layer in self.layers:
                raise UserError(f"{type(self._model).__name__} goes through a layer twice, which is not supported")
            self.layers.append(layer)
            self._called = []
            before, self._leave_after = len(self.calls), self._num_calls.get(structure)
            if structure in self._plain:
                self._leave_after = None
                self._end_plain(layer)
                return self._outputs[structure]
            try:
                output = forward(hidden_states, *args, **kwargs)
            except _LayerLeft:
                known = self._outputs[structure]
                return (hidden_states, *known[1:]) if isinstance(known, tuple) else hidden_states
            if len(self.calls) == before and self._may_be_plain(layer) and structure not in self._num_calls:
                self._plain.add(structure)
                self._end_plain(layer)
            if len(self.calls) == before or structure in self._num_calls:
                raise UserError(_no_call(self._model, index, layer, self._has_mixers))
            self._num_calls[structure] = len(self.calls) - before
            self._outputs[structure] = output
            self.pass_bytes = self._bytes.peak
            return output

        return run


def _zero_product(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """What the weights, which are zeros, would give: oneDNN would take memory for a copy of them."""
    return x.new_zeros((*x.shape[:-1], module.out_features))


def find_text_path(model: PreTrainedModel, keeps_latents: bool = True) -> TextPath:
    """
    Args:
        model: with its parameters on the meta device. It loses the tensors that a text does not need.
        keeps_latents: have what makes keys and values of latents hand over these.

    Raises:
        UserError: it cannot be served, with the reason.
    """
    layers = decoder_layers(model)
    modules = [module for layer in layers for module in layer.modules()]
    has_indexers = choose_all(modules)
    if keeps_latents:
        hand_over(modules)
    has_mixers = mixers.hand_over(modules)
    trial = _Trial(model, layers, has_mixers)
    with _zero_weights(model):
        try:
            trial.switch()
        except UserError:
            raise
        except Exception as error:  # of many kinds: it is the model's own code that asks for an image
            if not getattr(model, "_supports_attention_backend", False):
                raise UserError(_not_ours(model, has_mixers)) from error
            if text_config(model.config) is model.config:
                raise
            raise UserError(
                f"{type(model).__name__} cannot be run on text alone ({type(error).__name__}: {first_line(error)}), "
                "which is all that can be served"
            ) from error
    for layer in trial.plain:
        layer.register_forward_hook(_stop)
    attention, kv_columns = _with_stops(trial)
    return TextPath(
        layers=tuple(trial.layers),
        columns=tuple(trial.columns),
        attention=attention,
        kv_columns=kv_columns,
        projections=tuple(trial.projections),
        stops=tuple(column for column, call in enumerate(trial.calls) if call is None),
        states=_states(trial),
        unused=_strip(model, layers, trial),
        has_indexers=has_indexers,
        held_bytes=-(-trial.held_bytes // NUM_TOKENS),
        pass_bytes=-(-trial.pass_bytes // NUM_TOKENS),
        mix_bytes=trial.mix_bytes,
    )


def _longer(value: Any) -> Any:
    """What is given for each token, for as many tokens as a mixer gets at once."""
    if not isinstance(value, torch.Tensor) or value.shape[:2] != (1, NUM_TOKENS):
        return value
    return value.new_zeros((1, MOST_ROWS, *value.shape[2:]))


def _stop(layer: nn.Module, inputs: object, output: object) -> None:
    running = greenlet.getcurrent()
    if isinstance(running, ModelGreenlet):
        running.stop()


def _with_stops(trial: _Trial) -> tuple[tuple[AttentionSpec, ...], tuple[int, ...]]:
    """The attention of all columns, and whose keys and values they read; of stops the first call's, of which nothing is
    asked there, or one that hardly takes memory."""
    first = next((column for column, call in enumerate(trial.calls) if call is not None), 0)
    usual = trial.calls[first] or NO_ATTENTION
    kv_columns = [first if call is None else kv for call, kv in zip(trial.calls, trial.kv_columns, strict=True)]
    return tuple(call or usual for call in trial.calls), tuple(kv_columns)


def _states(trial: _Trial) -> tuple[StateSpec, ...]:
    found, end = [], 0
    for (kind, layer, number), (shape, dtype) in trial.states.items():
        state = StateSpec(kind, layer, number, shape, str(dtype).removeprefix("torch."), end)
        found.append(state)
        end += -(-state.num_bytes // STATE_ALIGNMENT) * STATE_ALIGNMENT
    return tuple(found)


def outside(model: nn.Module, layers: nn.ModuleList | tuple[nn.Module, ...]) -> list[nn.Module]:
    """The modules of `model` that are not in one of its layers."""
    inside = {module for layer in layers for module in layer.modules()}
    return [module for module in model.modules() if module not in inside]


def _not_ours(model: PreTrainedModel, has_mixers: bool) -> str:
    """Why a class cannot be served that has no attention call."""
    if getattr(model, "_is_stateful", False) and not has_mixers:
        return f"{type(model).__name__} keeps other state than a KV cache, in a way of its own, which is not supported"
    return no_interface(type(model))


def _no_call(model: PreTrainedModel, index: int, layer: nn.Module, has_mixers: bool) -> str:
    if not getattr(model, "_supports_attention_backend", False):
        return _not_ours(model, has_mixers)
    return (
        f"layer {index} ({type(layer).__name__}) has no attention call: "
        "it keeps other state than a KV cache, which is not supported"
    )


def _strip(model: PreTrainedModel, layers: nn.ModuleList, trial: _Trial) -> frozenset[str]:
    """Takes their tensors from the layers that were not entered, and from the parts of the model beside its decoder of
    which nothing was; their names. What is within the decoder, or gives the logits, is kept: a module's weight may be
    used without a call of the module."""
    kept = {*decoder_of(model).modules(), *(head.modules() if (head := model.get_output_embeddings()) else ())}
    unused = set(_branches(model, trial.entered | kept))
    unused |= {layer for layer in layers if layer not in trial.layers}
    prefixes = [name for name, module in model.named_modules() if module in unused]
    before = {name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())}
    for module in {part for branch in unused for part in branch.modules()}:
        for tensors in (module._parameters, module._buffers):
            tensors.update(dict.fromkeys(tensors))
    return frozenset(name for name in before if any(name.startswith(f"{prefix}.") for prefix in prefixes))


def _branches(module: nn.Module, used: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest parts below `module` of which nothing is used."""
    for child in module.children():
        if used.isdisjoint(child.modules()):
            yield child
        else:
            yield from _branches(child, used)


@contextlib.contextmanager
def _zero_weights(model: PreTrainedModel) -> Iterator[None]:
    """Binds every parameter to the same untouched zero pages for a while."""
    places = [(m, name, p) for m in model.modules() for name, p in m._parameters.items() if p is not None]
    size = max(p.numel() * p.element_size() for _, _, p in places)
    zeros = torch.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    try:
        for module, name, p in places:
            view = zeros[: p.numel() * p.element_size()].view(p.dtype).view(p.shape)
            module._parameters[name] = nn.Parameter(view, requires_grad=False)
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p

"""Learns a model by running three tokens through it: which layers a text goes through, how each calls attention, and
which tensors no text ever needs: those of a wrapper's towers for images and sounds, and of layers that look at them.

The weights are zeros in memory that is never written and so takes no RAM.

Shapes as in attention_call.py.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flexgen_lite.model.spec import AttentionSpec
from flexgen_lite.workers.compute.attention_call import AttentionCall, ModelGreenlet
from flexgen_lite.workers.compute.indexers import choose_all
from flexgen_lite.workers.compute.latents import hand_over
from flexgen_lite.workers.compute.live_bytes import LiveBytes
from flexgen_lite.workers.compute.model_inputs import model_inputs
from flexgen_lite.workers.model.builder import decoder_layers, decoder_of, no_interface, text_config
from flexgen_lite.workers.serve import UserError, first_line

NUM_TOKENS = 3
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
        has_indexers: whether there are layers whose tokens see those that an indexer chooses.
        held_bytes: that a token has, at most, while its attention is computed elsewhere.
        pass_bytes: that a token has, at most, on its way through a layer.
    """

    layers: tuple[nn.Module, ...]
    columns: tuple[int, ...]
    attention: tuple[AttentionSpec, ...]
    kv_columns: tuple[int, ...]
    unused: frozenset[str]
    has_indexers: bool
    held_bytes: int
    pass_bytes: int


class _LayerLeft(BaseException):
    """Leaves a decoder layer at its last attention call: there is nothing to learn behind it."""


class _Trial(ModelGreenlet):
    """Runs the first layer of each structure to its end, to see how often it calls attention, others up to their last
    call."""

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        super().__init__(self._run)
        self._model, self._all_layers = model, layers
        self.layers: list[nn.Module] = []
        self.columns: list[int] = []
        self.calls: list[AttentionSpec] = []
        self.kv_columns: list[int] = []
        self._kv: dict[object, tuple[int, list[_StorageRef]]] = {}  # views -> the first call with them, while they live
        self._bytes = LiveBytes()
        self.held_bytes = self.pass_bytes = 0  # of all tokens
        self.entered: set[nn.Module] = set()  # of the modules outside the layers
        self._num_calls: dict[object, int] = {}  # by structure
        self._outputs: dict[object, Any] = {}  # by structure, of its first layer
        self._leave_after: int | None = None

    def attend(self, call: AttentionCall) -> torch.Tensor:
        layer = len(self.layers) - 1
        if layer < 0:
            raise UserError(f"{type(self._model).__name__} attends before its first layer, which is not supported")
        self.columns.append(layer)
        self.kv_columns.append(self._kv_column(call))
        self.calls.append(call.spec)
        self.held_bytes = max(self.held_bytes, self._bytes.live)
        if self.columns.count(layer) == self._leave_after:
            raise _LayerLeft
        query, latents = call.query_BHTD, call.latents
        _, heads, tokens, head_dim = query.shape
        value_dim = call.value_BGTE.shape[3] if latents is None else latents.value_dim(heads, head_dim)
        return query.new_zeros((1, tokens, heads, value_dim))

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
            for index, layer in enumerate(self._all_layers):
                undo.callback(setattr, layer, "forward", layer.forward)
                layer.forward = self._of_layer(index, layer)
            undo.callback(setattr, nn.Linear, "forward", nn.Linear.forward)
            nn.Linear.forward = _zero_product  # type: ignore[assignment]
            tokens, positions = torch.zeros((1, NUM_TOKENS), dtype=torch.long), torch.arange(NUM_TOKENS)[None]
            with self._bytes:
                self._model(**model_inputs(self._model, tokens, positions))

    def _of_layer(self, index: int, layer: nn.Module) -> Callable[..., torch.Tensor]:
        forward = layer.forward
        structure = type(layer), tuple((name, tuple(value.shape)) for name, value in layer.named_parameters())

        def run(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if layer in self.layers:
                raise UserError(f"{type(self._model).__name__} goes through a layer twice, which is not supported")
            self.layers.append(layer)
            before, self._leave_after = len(self.calls), self._num_calls.get(structure)
            try:
                output = forward(hidden_states, *args, **kwargs)
            except _LayerLeft:
                known = self._outputs[structure]
                return (hidden_states, *known[1:]) if isinstance(known, tuple) else hidden_states
            if len(self.calls) == before or structure in self._num_calls:
                raise UserError(_no_call(self._model, index, layer))
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
    trial = _Trial(model, layers)
    with _zero_weights(model):
        try:
            trial.switch()
        except UserError:
            raise
        except Exception as error:  # of many kinds: it is the model's own code that asks for an image
            if not getattr(model, "_supports_attention_backend", False):
                raise UserError(no_interface(type(model))) from error
            if text_config(model.config) is model.config:
                raise
            raise UserError(
                f"{type(model).__name__} cannot be run on text alone ({type(error).__name__}: {first_line(error)}), "
                "which is all that can be served"
            ) from error
    return TextPath(
        layers=tuple(trial.layers),
        columns=tuple(trial.columns),
        attention=tuple(trial.calls),
        kv_columns=tuple(trial.kv_columns),
        unused=_strip(model, layers, trial),
        has_indexers=has_indexers,
        held_bytes=-(-trial.held_bytes // NUM_TOKENS),
        pass_bytes=-(-trial.pass_bytes // NUM_TOKENS),
    )


def outside(model: nn.Module, layers: nn.ModuleList | tuple[nn.Module, ...]) -> list[nn.Module]:
    """The modules of `model` that are not in one of its layers."""
    inside = {module for layer in layers for module in layer.modules()}
    return [module for module in model.modules() if module not in inside]


def _no_call(model: PreTrainedModel, index: int, layer: nn.Module) -> str:
    if not getattr(model, "_supports_attention_backend", False):
        return no_interface(type(model))
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

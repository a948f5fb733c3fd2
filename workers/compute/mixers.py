"""Layers that keep other state than keys and values (gated delta nets, Mamba, short convolutions ...): their own code,
run sequence by sequence over packed rows, with states from a store of ours.

Transformers' mixers read and write their state through the cache that they are given, by layer and number of the state:
`get_conv_state`, `update_conv_state`, `get_recurrent_state`, `update_recurrent_state`. Here they are given a `_Cache`,
which stands for the sequences of one call. Single-token kernels change what they have fetched in place, so that is
written back, too. RecurrentGemma's keep it in attributes, which are set before a call and read behind it.

Shapes: T rows of a micro-batch, N sequences, D items of a row.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import greenlet
import torch
from torch import nn

from flexgen_lite.model.spec import StateSpec
from flexgen_lite.workers.compute import recurrences
from flexgen_lite.workers.compute.attention_call import ModelGreenlet
from flexgen_lite.workers.serve import UserError
from flexgen_lite.workers.simd import LANES

CONV, RECURRENT, LINEAR, ATTRIBUTE = "conv", "recurrent", "linear", "attribute"
MOST_ROWS = 512  # of a sequence in one call: what a mixer makes of them takes memory
COPIES_BYTES = 16 << 20  # of states, at once; what is made of them takes several times that (plan/need.py)
NOTHING = -1  # a sequence's state before its first token
_LINEAR_READ = "get_linear_cache("
_READS = ("get_conv_state(", "get_recurrent_state(", _LINEAR_READ)
_METHODS = ("forward", "torch_forward", "slow_forward", "cuda_kernels_forward")
_CACHES = ("cache", "cache_params", "past_key_values")
_WEIGHT = re.compile(r"self\.(\w+)\.weight\b")
_ATTRIBUTE = re.compile(r"self\.((?:\w+\.)?\w+_states?) = ")
Key = tuple[str, int, int]  # kind, layer, number of the state


@dataclass(frozen=True, slots=True)
class StateSpan:
    """Rows `row .. row + num_rows` belong to one sequence, whose state is read from place `source` of the store
    (NOTHING: they are its first) and written to place `target`."""

    row: int
    num_rows: int
    source: int
    target: int


class States(Protocol):
    """States of sequences, by places."""

    def get(self, key: Key, places: Sequence[int]) -> torch.Tensor:
        """A copy of `[N, ...]`."""
        ...

    def put(self, key: Key, places: Sequence[int], values: torch.Tensor) -> None: ...


class _Layer:
    """What some classes look at in a cache's layers."""

    record_past = False


class _Layers:
    def __getitem__(self, index: int) -> _Layer:
        return _Layer()

    def __len__(self) -> int:
        return 1 << 20


class _Cache:
    """The part of Transformers' Cache that mixers call, for the sequences of one call."""

    layers = _Layers()

    def __init__(self, states: States, sources: Sequence[int], targets: Sequence[int], stands_in: bool = False) -> None:
        self._states, self._sources, self._targets = states, sources, targets
        self._stands_in = stands_in  # whether recurrent states may be left where they are
        self._has_past = sources[0] != NOTHING
        self._fetched: dict[Key, torch.Tensor] = {}  # and not written since

    def _get(self, key: Key) -> torch.Tensor | None:
        if not self._has_past:
            return None
        if key not in self._fetched:
            if key[0] == RECURRENT and self._stands_in:
                marker = self._states.in_place(key, self._sources, self._targets)  # type: ignore[attr-defined]
                if marker is not None:
                    return cast(torch.Tensor, marker)
            self._fetched[key] = self._states.get(key, self._sources)
        return self._fetched[key]

    def _put(self, key: Key, values: torch.Tensor) -> None:
        self._fetched.pop(key, None)
        self._states.put(key, self._targets, values)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._get((CONV, layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> torch.Tensor | None:
        return self._get((RECURRENT, layer_idx, state_idx))

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        return self._get((LINEAR, layer_idx, 0))

    def set_linear_cache(self, layer_idx: int, values: torch.Tensor) -> None:
        self._put((LINEAR, layer_idx, 0), values)

    def update_conv_state(
        self,
        conv_states: torch.Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The past columns and the new ones, the last of which are kept."""
        key = (CONV, layer_idx, state_idx)
        past, new = self._get(key), conv_states
        if past is not None:
            new = torch.cat((past, new), dim=-1)
        size = conv_kernel_size or (new.shape[-1] if past is None else past.shape[-1])
        if new.shape[-1] < size:
            new = nn.functional.pad(new, (size - new.shape[-1], 0))
        self._put(key, new[..., -size:])
        return new

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> torch.Tensor:
        if recurrences.places_of(recurrent_states) is None:
            self._put((RECURRENT, layer_idx, state_idx), recurrent_states)
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        return self._has_past

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def finish(self) -> None:
        """Writes what was fetched, which may have been changed in place."""
        for key, values in list(self._fetched.items()):
            self._put(key, values)


class _Attributes:
    """State that a module keeps in attributes of its own, or of a part: None before the first token."""

    def __init__(self, module: nn.Module, names: Iterable[str], number: int) -> None:
        self._places: dict[Key, tuple[nn.Module, str]] = {}
        for index, path in enumerate(names):
            part, _, name = path.rpartition(".")
            self._places[ATTRIBUTE, number, index] = module.get_submodule(part), name

    def set(self, states: States, sources: Sequence[int]) -> None:
        for key, (owner, name) in self._places.items():
            setattr(owner, name, None if sources[0] == NOTHING else states.get(key, sources))

    def take(self, states: States, targets: Sequence[int]) -> None:
        for key, (owner, name) in self._places.items():
            states.put(key, targets, getattr(owner, name))
            setattr(owner, name, None)


class _Outputs:
    """What a module gives for the rows of a micro-batch, from call to call: of what is per token, every row; no other
    tensors, which are states."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._found: dict[int, Any] = {}  # by place in the module's tuple
        self._per_token: set[int] = set()
        self._is_tuple = False

    def put(self, rows: slice | list[int], shape_NT: torch.Size, output: Any) -> None:
        """`rows` are those of a call with `shape_NT` tokens."""
        self._is_tuple = isinstance(output, tuple)
        for index, part in enumerate(output if self._is_tuple else (output,)):
            is_per_token = isinstance(part, torch.Tensor) and part.shape[:2] == shape_NT
            if is_per_token and index not in self._found:
                self._found[index] = part.new_empty((1, self._num_rows, *part.shape[2:]))
                self._per_token.add(index)
            if is_per_token and index in self._per_token:
                self._found[index][0, rows] = part.flatten(0, 1)
            else:
                self._found[index] = None if isinstance(part, torch.Tensor) else part
                self._per_token.discard(index)

    def result(self) -> Any:
        return tuple(self._found.values()) if self._is_tuple else self._found[0]


class Mixer:
    """A module that keeps state, in place of its forward.

    Args:
        number: of the module among those of its model.

    Attributes:
        goes_on: it takes several tokens after a state.
        begins_whole: it gets a prompt's first rows in one call, however many.
    """

    def __init__(self, module: nn.Module, number: int) -> None:
        kind: Any = type(module)
        self._forward: Callable[..., Any] = module.forward
        self._names = tuple(inspect.signature(kind.forward).parameters)[1:]  # without self
        attributes = _attributes(kind)
        self._attributes = _Attributes(module, attributes, number) if attributes else None
        self._cache = next((name for name in _CACHES if name in self._names), "")
        if not (self._cache or attributes):
            raise UserError(f"{kind.__name__} takes its state from where it is not known here, which is not supported")
        self.goes_on = _goes_on(kind)
        self.begins_whole = not self.goes_on or _LINEAR_READ in _source(kind)  # goes on token by token within
        self._module, self._stands_in = module, False
        self._single_is_ours = recurrences.stand_in(module)
        self._together = 1 << 20  # sequences whose single tokens are computed at once

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        running = greenlet.getcurrent()
        if not isinstance(running, ModelGreenlet):
            return self._forward(hidden_states, *args, **kwargs)
        return running.mix(self, hidden_states, args, kwargs)

    def prepare(self, states: Sequence[StateSpec], on_cpu: bool) -> None:
        """Have single tokens computed by our own kernel on a CPU, where it gives what the class's function gives; else
        not more at once than COPIES_BYTES of states are copied for."""
        own = [state for state in states if state.layer == getattr(self._module, "layer_idx", None)]
        matrices = [state for state in own if state.kind == RECURRENT]
        if on_cpu and matrices and all(len(state.shape) == 3 and state.dtype == "float32" for state in matrices):
            self._stands_in = self._single_is_ours and matrices[0].shape[-1] % LANES == 0
        copied = [state for state in own if not (self._stands_in and state.kind == RECURRENT)]
        self._together = max(1, COPIES_BYTES // max(1, sum(state.num_bytes for state in copied)))

    def run(
        self,
        rows_1TD: torch.Tensor,
        spans: Sequence[StateSpan],
        states: States,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What the module makes of the rows of several sequences, each after its own state: single tokens of all of
        them at once, others one by one."""
        given = {**dict(zip(self._names[1:], args, strict=False)), **kwargs}
        known = {name: value for name, value in given.items() if name in self._names}
        if "attention_mask" in self._names:
            known["attention_mask"] = None
        rows_of_tokens = rows_1TD.shape[:2]
        outputs = _Outputs(rows_of_tokens[1])

        def call(rows: slice | list[int], sources: list[int], targets: list[int]) -> None:
            """Several of one sequence, or one of each."""

            def taken(value: Any) -> Any:
                is_per_token = isinstance(value, torch.Tensor) and value.shape[:2] == rows_of_tokens
                return value[0, rows].unflatten(0, (len(sources), -1)) if is_per_token else value

            arguments = {name: taken(value) for name, value in known.items()}
            rows_NTD = taken(rows_1TD)
            outputs.put(rows, rows_NTD.shape[:2], self._call(rows_NTD, arguments, states, sources, targets))

        singles = [span for span in spans if span.num_rows == 1 and span.source != NOTHING]
        for begin in range(0, len(singles), self._together):
            single = singles[begin : begin + self._together]
            numbers = [span.row for span in single]
            is_run = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            rows = slice(numbers[0], numbers[0] + len(numbers)) if is_run else numbers
            call(rows, [span.source for span in single], [span.target for span in single])
        for span in spans:
            if span.num_rows > 1 or span.source == NOTHING:
                source, first = span.source, 0
                while first < span.num_rows:
                    left, begin = span.num_rows - first, span.row + first
                    count = min(MOST_ROWS, left) if self.goes_on else 1
                    if source == NOTHING and self.begins_whole:
                        count = left
                    call(slice(begin, begin + count), [source], [span.target])
                    source, first = span.target, first + count
        return outputs.result()

    def _call(
        self, rows_NTD: torch.Tensor, known: dict[str, Any], states: States, sources: list[int], targets: list[int]
    ) -> Any:
        if self._attributes is not None:
            self._attributes.set(states, sources)
            found = self._forward(rows_NTD, **{**known, "use_cache": True})
            self._attributes.take(states, targets)
            return found
        stands_in = self._stands_in and rows_NTD.shape[1] == 1 and hasattr(states, "in_place")
        cache = _Cache(states, sources, targets, stands_in)
        found = self._forward(rows_NTD, **{**known, self._cache: cache})
        cache.finish()
        return found


@cache
def _source(kind: Any) -> str:
    """Of the code that runs in its forward."""
    texts = []
    for name in _METHODS:
        try:
            texts.append(inspect.getsource(getattr(kind, name)))
        except (AttributeError, OSError, TypeError):
            continue
    return "".join(texts)


@cache
def _attributes(kind: Any) -> tuple[str, ...]:
    """Those in which a module keeps state, if it is asked to."""
    if "use_cache" not in inspect.signature(kind.forward).parameters:
        return ()
    return tuple(sorted(set(_ATTRIBUTE.findall(_source(kind)))))


def is_mixer(module: nn.Module) -> bool:
    """Whether it reads state from a cache, or keeps it itself."""
    kind: Any = type(module)
    text = _source(kind)
    return any(call in text for call in _READS) or bool(_attributes(kind))


def prepare(modules: Iterable[nn.Module], states: Sequence[StateSpec], on_cpu: bool) -> None:
    """Tells the modules' mixers of their states, see Mixer.prepare."""
    for module in modules:
        if isinstance(module.forward, Mixer):
            module.forward.prepare(states, on_cpu)


def read_projections(modules: Iterable[nn.Module]) -> frozenset[nn.Module]:
    """Linear layers of mixers whose weights are read beside their own forward."""
    found: set[nn.Module] = set()
    for module in modules:
        kind: Any = type(module)
        if is_mixer(module):
            parts = (getattr(module, name, None) for name in _WEIGHT.findall(_source(kind)))
            found |= {part for part in parts if isinstance(part, nn.Linear)}
    return frozenset(found)


def _goes_on(kind: Any) -> bool:
    """Whether it takes several tokens after a state: Mamba's first version does not, nor does RecurrentGemma."""
    text = _source(kind)
    if _attributes(kind):
        return False
    return "get_recurrent_state(" not in text or "initial_state" in text


def hand_over(modules: Iterable[nn.Module]) -> bool:
    """Has those of the modules that keep state do so in states of ours. Whether there are any."""
    found = [module for module in modules if is_mixer(module)]
    for number, module in enumerate(found):
        if not isinstance(module.forward, Mixer):
            module.forward = Mixer(module, number)
    return bool(found)

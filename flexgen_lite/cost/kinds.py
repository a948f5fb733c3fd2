"""Which columns of a model take the same time: those of one *kind*. Pure logic.

Kinds are numbered in the order in which the model has them, so that the same shape has the same numbers everywhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import pairwise

from flexgen_lite.model.spec import ModelSpec, UnitSpec

OUTSIDE = -1  # before the first column, and behind the last


def layer_kinds(spec: ModelSpec) -> tuple[int, ...]:
    """Of each layer: by the shapes of its weights, and how they are read."""
    return _numbered(_weights(unit) for unit in spec.units[: spec.num_layers])


def column_kinds(spec: ModelSpec) -> tuple[int, ...]:
    """Of each column: by its layer's weights, and its attention or state."""
    layers, stops, states = layer_kinds(spec), frozenset(spec.stops), _states_of_layers(spec)
    found = []
    for column, layer in enumerate(spec.columns):
        attention = None if column in stops else spec.attention[column]
        stores = spec.kv_columns[column] == column
        found.append((layers[layer], column - spec.columns.index(layer), attention, stores, states[layer]))
    return _numbered(found)


def segment_kinds(spec: ModelSpec) -> tuple[tuple[int, int], ...]:
    """Of each segment, one more than there are columns: the kinds of the column that it finishes and of that it
    enters."""
    kinds = (OUTSIDE, *column_kinds(spec), OUTSIDE)
    return tuple(pairwise(kinds))


def columns_to_measure(spec: ModelSpec, most: int) -> int:
    """How many of the first columns have a segment of every kind, but for the last one; at most so many."""
    kinds = segment_kinds(spec)[:-1]
    last = max(kinds.index(kind) for kind in set(kinds))
    return min(most, last + 1)


def _weights(unit: UnitSpec) -> Hashable:
    tensors = tuple((tensor.shape, tensor.dtype, tensor.packing) for tensor in unit.tensors)
    return tensors, bool(unit.converted)


def _states_of_layers(spec: ModelSpec) -> list[Hashable]:
    found: list[list[Hashable]] = [[] for _ in range(spec.num_layers)]
    for state in spec.states:
        if state.layer < spec.num_layers:
            found[state.layer].append((state.kind, state.shape, state.dtype))
    return [tuple(states) for states in found]


def _numbered(items: Iterable[Hashable]) -> tuple[int, ...]:
    numbers: dict[Hashable, int] = {}
    return tuple(numbers.setdefault(item, len(numbers)) for item in items)

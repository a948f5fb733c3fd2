"""States of sequences in an arena: each tensor of each place by itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from flexgen_lite.model.spec import StateSpec
from flexgen_lite.workers.compute import recurrences
from flexgen_lite.workers.compute.state_store import StateStore

STATES = (
    StateSpec("conv", 0, 0, (10, 3), "bfloat16", 0),
    StateSpec("recurrent", 0, 0, (2, 4, 16), "float32", 64),
    StateSpec("conv", 2, 0, (10, 3), "bfloat16", 576),
    StateSpec("conv", 2, 1, (7,), "float32", 640),
)
PLACES = 6
CPU = torch.device("cpu")


class Spec:
    """What a store asks of a ModelSpec."""

    states, state_bytes = STATES, 704


def store_of(memory: torch.Tensor) -> StateStore:
    spec: Any = Spec()
    return StateStore(memory, spec, CPU)


def test_bytes_of_states() -> None:
    assert [state.num_bytes for state in STATES] == [60, 512, 60, 28]
    for one, other in itertools.pairwise(STATES):
        assert one.offset + one.num_bytes <= other.offset
    assert STATES[-1].offset + STATES[-1].num_bytes <= Spec.state_bytes


def test_what_is_put_is_found_again_and_nothing_else_is_touched() -> None:
    memory = torch.zeros(PLACES * Spec.state_bytes, dtype=torch.uint8)
    store, draws = store_of(memory), torch.Generator().manual_seed(0)
    expected = {}
    for state in STATES:
        key = state.kind, state.layer, state.number
        for places in ([4, 1], [0], [5, 3, 2]):
            values = torch.randn((len(places), *state.shape), generator=draws)
            store.put(key, places, values)
            for place, value in zip(places, values, strict=True):
                expected[key, place] = value.to(getattr(torch, state.dtype))
    for (key, place), value in expected.items():
        assert torch.equal(store.get(key, [place])[0], value)
        assert torch.equal(store_of(memory).get(key, [place])[0], value), "another process finds them"
    for place in range(PLACES):
        padding = memory[place * Spec.state_bytes + 60 : place * Spec.state_bytes + 64]
        assert not padding.any()


def test_what_is_got_is_a_copy() -> None:
    store = store_of(torch.zeros(PLACES * Spec.state_bytes, dtype=torch.uint8))
    key = "recurrent", 0, 0
    store.get(key, [1, 2]).fill_(1)
    assert not store.get(key, [1, 2]).any()


@pytest.mark.parametrize(("key", "has_address"), [(("recurrent", 0, 0), True), (("conv", 0, 0), False)])
def test_addresses_of_states_in_float32(key: tuple[str, int, int], has_address: bool) -> None:
    memory = torch.zeros(PLACES * Spec.state_bytes, dtype=torch.uint8)
    marker = store_of(memory).in_place(key, [3, 0], [2, 1])
    assert (marker is not None) == has_address
    if marker is not None:
        places = recurrences.places_of(marker)
        assert places is not None and marker.shape == (2, 2, 4, 16)
        start = memory.data_ptr() + 64
        assert places.sources.tolist() == [start + 3 * 704, start]
        assert places.targets.tolist() == [start + 2 * 704, start + 704]

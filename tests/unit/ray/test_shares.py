"""What part of a machine an actor gets."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.ray.shares import ENGINE_RAM, LEFT_CPUS, Node, share_of

GIB = 1 << 30
nodes = st.lists(
    st.builds(
        Node, st.integers(0, 64).map(float), st.integers(0, 8).map(float), st.integers(0, 1 << 40).map(float)
    ),
    max_size=5,
)  # fmt: skip


def test_an_actor_has_a_machine_of_its_own_and_leaves_room_for_tasks() -> None:
    share = share_of([Node(16, memory=40 * GIB)] * 4, 4, None, None, with_gpu=True)
    assert (share.ray_cpus, share.ray_gpus, share.actors_per_machine) == (9, 0, 1)
    assert share.num_cpus(16) == 16
    assert share.ram == int(40 * GIB * ENGINE_RAM)


def test_several_on_a_machine_divide_it() -> None:
    share = share_of([Node(8, memory=40 * GIB)], 2, None, None, with_gpu=True)
    assert (share.ray_cpus, share.actors_per_machine, share.num_cpus(8)) == (3, 2, 4)
    assert share.ram == int(20 * GIB * ENGINE_RAM)


def test_the_user_decides() -> None:
    share = share_of([Node(8)], 2, 3, None, with_gpu=True)
    assert (share.ray_cpus, share.num_cpus(8), share.num_cpus(2)) == (3, 3, 2)


def test_a_gpu_each_where_there_are_some() -> None:
    machines = [Node(32, 4), Node(64, 0)]
    share = share_of(machines, 4, None, None, with_gpu=True)
    assert (share.ray_cpus, share.ray_gpus, share.actors_per_machine, share.num_cpus(32)) == (1, 1, 4, 8)
    assert share_of(machines, 2, None, None, with_gpu=False).ray_gpus == 0
    assert share_of(machines, 2, None, 0.5, with_gpu=True).ray_gpus == 0.5


@given(nodes, st.integers(1, 12), st.booleans())
def test_there_is_always_room_for_reading(machines: list[Node], actors: int, with_gpu: bool) -> None:
    share = share_of(machines, actors, None, None, with_gpu)
    able = [node for node in machines if node.cpus > 0 and node.gpus >= share.ray_gpus]
    assert share.ray_cpus > 0 and share.num_cpus(4) >= 1
    if able and share.ray_gpus == 0:
        least, on_one = min(node.cpus for node in able), math.ceil(actors / len(able))
        assert share.actors_per_machine == on_one
        assert on_one * share.ray_cpus <= max(least - LEFT_CPUS, least / 2)
        assert share.ray_cpus < 1 or share.ray_cpus.is_integer(), "Ray takes no other number"
        if least >= 2 * LEFT_CPUS + 2 and on_one == 1:
            assert 2 * share.ray_cpus > least, "no room for another"
    if share.ram is not None:
        assert share.ram * share.actors_per_machine <= min(node.memory for node in able)


@pytest.mark.parametrize(("cpus", "one", "two"), [(1, 0.5, 0.25), (2, 1, 0.5), (3, 1, 0.75), (4, 2, 1), (6, 4, 2)])
def test_small_machines(cpus: int, one: float, two: float) -> None:
    kept = [share_of([Node(cpus)], actors, None, None, with_gpu=False).ray_cpus for actors in (1, 2)]
    assert kept == [one, two]

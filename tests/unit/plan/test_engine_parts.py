"""Engines of one machine: how many, and which CPUs and GPU each has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.plan import topology
from flexgen_lite.plan.engine_parts import cpus_text, engine_parts, num_engines
from flexgen_lite.plan.plan import PlanError
from flexgen_lite.plan.topology import Topology, inspect_topology, visible_gpus

TWO_NODES = Topology((((0, 8), (1, 9), (2, 10), (3, 11)), ((4, 12), (5, 13), (6, 14), (7, 15))))

GPUS = {"0000:01:00.0": 1, "0000:8a:00.0": 0, "0001:01:00.0": -1}  # the node of each


def config(**values: Any) -> EngineConfig:
    return EngineConfig(model="m", **values)


@pytest.mark.parametrize(
    ("values", "gpus", "count"),
    [
        ({"engines": "auto"}, 0, 2),
        ({"engines": "auto"}, 4, 4),
        ({"engines": "auto", "device": "cuda"}, 3, 3),
        ({"engines": "auto", "device": "cpu"}, 4, 2),
        ({"engines": 16}, 0, 16),
        ({"engines": 2}, 4, 2),
    ],
)
def test_how_many(values: dict[str, Any], gpus: int, count: int) -> None:
    assert num_engines(config(**values), Topology(TWO_NODES.nodes, (None,) * gpus)) == count


@pytest.mark.parametrize(
    ("values", "gpus", "message"),
    [
        ({"engines": 17}, 0, "engines=17 is more than there are CPUs to share, 16: lower engines, or give auto"),
        ({"engines": 3}, 2, "engines=3 is more than there are GPUs, 2, and each engine needs one of its own: lower"),
        ({"engines": 2, "device": "cuda"}, 0, "engines=2 is more than there are GPUs, 0"),
    ],
)
def test_too_many(values: dict[str, Any], gpus: int, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        num_engines(config(**values), Topology(TWO_NODES.nodes, (None,) * gpus))


def test_nodes_and_cores_stay_whole() -> None:
    def cpus(count: int) -> list[tuple[int, ...]]:
        return [part.cpus for part in engine_parts(config(), TWO_NODES, count)]

    assert cpus(1) == [tuple(range(16))]
    assert cpus(2) == [(0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)]
    assert cpus(4) == [(0, 1, 8, 9), (2, 3, 10, 11), (4, 5, 12, 13), (6, 7, 14, 15)]
    assert cpus(3) == [(0, 1, 8, 9), (2, 3, 4, 10, 11, 12), (5, 6, 7, 13, 14, 15)]
    assert cpus(16)[:3] == [(0,), (8,), (1,)], "more than there are cores"


def test_cpus_as_people_read_them() -> None:
    assert cpus_text((0, 1, 2, 3, 8, 10, 11)) == "0-3, 8, 10-11"


@pytest.mark.parametrize(
    ("gpus", "devices"),
    [
        ((None, None), [0, 1]),
        ((0, 1), [0, 1]),
        ((1, 0), [1, 0]),
        ((0, 0, 1, 1), [0, 2]),  # as many engines as parts, not as GPUs
        ((0, 0), [0, 1]),
        ((1, 1), [1, 0]),
        ((None, 0), [1, 0]),
    ],
)
def test_a_gpu_is_of_the_same_node(gpus: tuple[int | None, ...], devices: list[int]) -> None:
    there = Topology(TWO_NODES.nodes, gpus)
    assert [part.device for part in engine_parts(config(), there, 2)] == [f"cuda:{gpu}" for gpu in devices]
    assert {part.device for part in engine_parts(config(device="cpu"), there, 2)} == {"cpu"}


def test_a_part_over_nodes_leaves_the_others_theirs() -> None:
    """Of three parts the one in the middle is of both nodes."""
    parts = engine_parts(config(), Topology(TWO_NODES.nodes, (0, 1, 1)), 3)
    assert [part.device for part in parts] == ["cuda:0", "cuda:2", "cuda:1"]


@given(gpus=st.lists(st.none() | st.integers(0, 2), min_size=1, max_size=8), data=st.data())
def test_each_gpu_is_one_engines(gpus: list[int | None], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(gpus)))
    parts = engine_parts(config(), Topology(TWO_NODES.nodes, tuple(gpus)), count)
    devices = {part.device for part in parts}
    assert len(devices) == count and devices <= {f"cuda:{gpu}" for gpu in range(len(gpus))}


@given(
    nodes=st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=9), min_size=1, max_size=4),
    share=st.floats(0, 1),
)
def test_each_cpu_is_one_engines(nodes: list[list[int]], share: float) -> None:
    numbers = iter(range(1000))
    found = Topology(tuple(tuple(tuple(next(numbers) for _ in range(size)) for size in node) for node in nodes))
    count = 1 + round(share * (found.num_cpus - 1))
    parts = engine_parts(config(), found, count)
    assert [part.number for part in parts] == [*range(count)] and all(part.cpus for part in parts)
    assert sorted(cpu for part in parts for cpu in part.cpus) == [*range(found.num_cpus)]
    cores = [core for node in found.nodes for core in node]
    if count <= len(cores):
        assert all(sum(bool({*core} & {*part.cpus}) for part in parts) == 1 for core in cores), "no core is divided"
    if count == len(found.nodes):
        assert [part.cpus for part in parts] == [tuple(cpu for core in node for cpu in core) for node in found.nodes]


def test_what_the_system_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 4, 6})
    for cpu in range(8):
        folder = tmp_path / "cpu" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    for node, cpus in enumerate(("0-1,4-5\n", "2-3,6-7\n", "8-11\n", "\n")):
        (tmp_path / "node" / f"node{node}").mkdir(parents=True)
        (tmp_path / "node" / f"node{node}" / "cpulist").write_text(cpus)
    for name, node in GPUS.items():
        (tmp_path / "gpus" / name).mkdir(parents=True)
        (tmp_path / "devices" / name).mkdir(parents=True)
        (tmp_path / "devices" / name / "numa_node").write_text(f"{node}\n")
    monkeypatch.setattr(topology, "_torch_has_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = inspect_topology(tmp_path / "cpu", tmp_path / "node", tmp_path / "gpus", tmp_path / "devices")
    assert found == Topology((((0, 4), (1,)), ((2, 6),)), (1, 0, None))
    nothing = inspect_topology(tmp_path, tmp_path, tmp_path / "gpus", tmp_path)
    assert nothing == Topology((((0,), (1,), (2,), (4,), (6,)),), (None, None, None))


@pytest.mark.parametrize(
    ("visible", "places"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("0", [0]),
        ("2,1", [2, 1]),
        ("0,-1,2", [0]),
        ("7", [None]),
        ("GPU-3c,GPU-1,GPU-4d,GPU-2b", [2, 0, None]),
    ],
)
def test_visible_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, places: list[int | None]
) -> None:
    for name, uuid in zip(GPUS, ("GPU-1a", "GPU-2b", "GPU-3c"), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "information").write_text(f"Model: \t\t NVIDIA H200\nGPU UUID: \t {uuid}\n")
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.setattr(topology, "_torch_has_cuda", lambda: True)
    expected = [None if place is None else [*GPUS][place] for place in places]
    assert visible_gpus(tmp_path, environment) == expected
    monkeypatch.setattr(topology, "_torch_has_cuda", lambda: False)
    assert visible_gpus(tmp_path, environment) == []

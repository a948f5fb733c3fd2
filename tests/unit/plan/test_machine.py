"""What a machine offers, read from a made-up one."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_lite.plan import machine
from flexgen_lite.plan.machine import Machine, cpu_quota, inspect_machine, num_cores, num_nodes


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    for cpu in range(8):
        write(tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}\n")
    assert num_cores(range(8), tmp_path) == 4
    assert num_cores([0, 1, 4], tmp_path) == 2, "of the CPUs that may be used"
    assert num_cores([0, 99], tmp_path) is None, "where the system does not say"


def test_nodes_that_have_cpus_of_ours(tmp_path: Path) -> None:
    write(tmp_path / "node0" / "cpulist", "0-3,8-11\n")
    write(tmp_path / "node1" / "cpulist", "4-7,12\n")
    write(tmp_path / "node2" / "cpulist", "\n")  # memory alone
    assert num_nodes(range(13), tmp_path) == 2
    assert num_nodes([9, 2], tmp_path) == 1
    assert num_nodes([3, 12], tmp_path) == 2
    assert num_nodes([0], tmp_path / "nowhere") == 1, "where the system does not say"


def test_engines_share_what_time_the_cgroup_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: 5)
    assert [inspect_machine(engines=count).quota for count in (1, 2, 8)] == [5, 2, 1]


@pytest.mark.parametrize(
    ("quota", "cores", "threads"), [(None, None, 8), (None, 4, 4), (2, 4, 2), (6, 4, 4), (0, 4, 1)]
)
def test_threads_that_pay(quota: int | None, cores: int | None, threads: int) -> None:
    assert Machine(tuple(range(8)), 1, 1, quota, cores).num_threads == threads


def test_the_tightest_quota_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(machine, "_cgroup_folders", lambda name: [] if name else [tmp_path / "a" / "b", tmp_path / "a"])
    assert cpu_quota() is None
    write(tmp_path / "a" / "b" / "cpu.max", "max 100000\n")
    write(tmp_path / "a" / "cpu.max", "250000 100000\n")
    assert cpu_quota() == 3


def test_this_machine() -> None:
    found = inspect_machine()
    assert found.available_ram > 0
    assert 1 <= found.num_threads <= len(found.cpus)


def test_a_part_of_this_machine() -> None:
    (first, *_) = inspect_machine().cpus
    found = inspect_machine([first])
    assert (found.cpus, found.num_threads, found.numa_nodes) == ((first,), 1, 1)

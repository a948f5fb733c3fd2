"""Processors that actors of a machine have to themselves."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from flexgen_lite.ray.claimed_cpus import ClaimedCpus, by_core


def test_nobody_gets_what_another_has(tmp_path: Path) -> None:
    with ClaimedCpus(2, range(5), tmp_path) as one, ClaimedCpus(2, range(5), tmp_path) as other:
        assert len(one.cpus) == len(other.cpus) == 2
        assert not {*one.cpus} & {*other.cpus}
        with ClaimedCpus(2, range(5), tmp_path) as third:
            assert len(third.cpus) == 1, "what is left"
            with ClaimedCpus(1, range(5), tmp_path) as fourth:
                assert fourth.cpus == ()
    with ClaimedCpus(5, range(5), tmp_path) as all_of_them:
        assert all_of_them.cpus == (0, 1, 2, 3, 4)


def test_a_killed_process_has_none(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flexgen_lite.ray.claimed_cpus import ClaimedCpus\n"
        "claim = ClaimedCpus(2, range(2), Path(sys.argv[1])); print(claim.cpus, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "(0, 1)\n"
        with ClaimedCpus(2, range(2), tmp_path) as claim:
            assert claim.cpus == ()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with ClaimedCpus(2, range(2), tmp_path) as claim:
        assert claim.cpus == (0, 1)


def test_processors_of_a_core_go_together(tmp_path: Path) -> None:
    for cpu, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1-3"}.items():
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    assert by_core([0, 1, 2, 3], tmp_path) == [0, 2, 1, 3]
    assert by_core([7, 5], tmp_path) == [5, 7], "where the system does not say"

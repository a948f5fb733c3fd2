"""A lost compute worker is forked from a process that has its libraries, and is like a fresh one in all else."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flexgen_lite import FlexGenLite, SamplingParams
from tests.engine_processes import survivors, workers_of, zygote_of
from tests.tiny_models import make_model, ragged_prompts

pytestmark = pytest.mark.usefixtures("runtime")
own_zygotes = pytest.mark.usefixtures("own_zygotes")
PROMPTS = ragged_prompts(12, longest=20)
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
COMPUTE = "compute worker"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


def start(model: Path) -> FlexGenLite:
    return FlexGenLite(model, dtype="float32", attention_workers=1, attention_threads=1, layer_slots=2)


def tokens(engine: FlexGenLite) -> list[list[int]]:
    return [list(completion.token_ids) for completion in engine.generate(PROMPTS, GREEDY)]


@own_zygotes
def test_every_loss_is_made_good_by_a_fork(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flexgen_lite")
    with start(model) as engine:
        expected, zygote = tokens(engine), zygote_of(engine.engine_pid)
        fresh = workers_of(engine.engine_pid)[COMPUTE]
        state_of_fresh = state(fresh.pid)
        assert zygote.ppid() == fresh.pid, "the first one has left it behind"
        for ending in (signal.SIGKILL, signal.SIGSEGV, signal.SIGKILL):
            workers_of(engine.engine_pid)[COMPUTE].send_signal(ending)
            assert tokens(engine) == expected
            fork = workers_of(engine.engine_pid)[COMPUTE]
            assert fork.ppid() == zygote.pid
            assert state(fork.pid) == state_of_fresh
            assert f"was killed by {ending.name}" in caplog.text
            caplog.clear()
        time.sleep(2.5)  # it is looked at from time to time
        assert zygote_of(engine.engine_pid) == zygote
        assert zygote.ppid() == engine.engine_pid, "it stays in the engine's tree"
        used = engine.status().processes["zygote"]
        assert 0 < used["peak"] <= used["planned"] < psutil.Process(zygote.pid).memory_info().rss / 4
        zygote.kill()
        assert tokens(engine) == expected
        assert fork.is_running(), "it needs the zygote no more"
        fork.kill()
        assert tokens(engine) == expected
        assert workers_of(engine.engine_pid)[COMPUTE].ppid() == engine.engine_pid, "it is fresh"
        another = zygote_of(engine.engine_pid)
    assert not another.is_running()


def state(pid: int) -> tuple[dict[str, str], list[str]]:
    """Signals, threads and descriptors of a process."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    targets = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    kinds = sorted(re.sub(r"\d+", "", target) for target in targets)
    return {name: lines[name] for name in ("SigBlk", "SigIgn", "SigCgt", "Threads", "NSpgid")}, kinds


@own_zygotes
def test_a_zygote_that_does_not_answer_is_killed(model: Path) -> None:
    with start(model) as engine:
        expected, zygote = tokens(engine), zygote_of(engine.engine_pid)
        zygote.suspend()
        workers_of(engine.engine_pid)[COMPUTE].kill()
        assert tokens(engine) == expected
        fresh, another = workers_of(engine.engine_pid)[COMPUTE], zygote_of(engine.engine_pid)
        assert another != zygote
        assert (fresh.ppid(), another.ppid()) == (engine.engine_pid, fresh.pid)
        fresh.kill()
        assert tokens(engine) == expected
        assert workers_of(engine.engine_pid)[COMPUTE].ppid() == another.pid


@own_zygotes
def test_zygote_and_fork_end_with_the_coordinator(model: Path) -> None:
    code = (
        "import sys; from flexgen_lite import FlexGenLite\n"
        "engine = FlexGenLite(sys.argv[1], attention_workers=1); print(engine.engine_pid, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(model)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        coordinator = int(owner.stdout.readline())
        zygote, first = zygote_of(coordinator), workers_of(coordinator)[COMPUTE]
        first.kill()
        assert not survivors([first], 30)
        while COMPUTE not in workers_of(coordinator):
            time.sleep(0.01)
        fork = workers_of(coordinator)[COMPUTE]
        fork.suspend()  # it is in no state to notice anything
        owner.kill()
        os.kill(coordinator, signal.SIGKILL)
        assert not survivors([zygote, fork], 2)
    tidy = "from flexgen_lite.wire.runtime_dir import RuntimeDir; RuntimeDir().remove()"
    subprocess.run([sys.executable, "-c", tidy], check=True, timeout=60)


def test_a_process_with_threads_leaves_none() -> None:
    """The fork would have one of them."""
    code = """
import socket, threading, time
from flexgen_lite.wire.zygote_messages import zygote_pair
from flexgen_lite.workers import zygote

threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
ours, theirs = zygote_pair()
assert zygote.leave_behind(theirs, ()) is None
assert ours.recv(1) == b"", "nobody is at the other end"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_other_tests_have_their_engines_from_shared_zygotes(model: Path) -> None:
    """Or they take four times as long."""
    with start(model) as engine:
        found = {name: worker.cmdline() for name, worker in workers_of(engine.engine_pid).items()}
    assert set(found) == {"compute worker", "disk loader", "attention worker 0"}
    assert all("tests.zygotes" in line for line in found.values())

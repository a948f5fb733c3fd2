"""Any worker may be lost at any moment: the job ends with the same tokens as if nothing had happened."""

from __future__ import annotations

import logging
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexgen_lite import EngineError, FlexGenLite, SamplingParams
from flexgen_lite.launcher import supervisor
from tests.engine_processes import workers_of
from tests.fault_injection import Fault, inject, struck, until_all_struck
from tests.tiny_models import make_model, ragged_prompts, some_alike

WORKERS = ("compute worker", "disk loader", "attention worker 1")
PROMPTS = some_alike(ragged_prompts(40, longest=20))
SAMPLED = SamplingParams(max_tokens=24, temperature=0.9, top_k=50, seed=7, ignore_eos=True)
OPTIONS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"layer_slots": 2},
    "staged": {"stage_weights": True, "layer_slots": 2},
    "on the device alone": {"stage_weights": True, "layer_slots": 2, "device_slots": 4},
    "projections on the CPU": {"stage_weights": True, "layer_slots": 2, "cpu_projections": "qkv"},
    "several micro-batches": {"micro_batches": 3, "micro_batch_tokens": 64, "max_sequences": 24},
}


def start(model: Path, **options: Any) -> FlexGenLite:
    return FlexGenLite(model, attention_workers=2, attention_threads=1, dtype="float32", **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("opt", tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with start(model) as engine:
        return tokens(engine)


def tokens(engine: FlexGenLite, params: SamplingParams = SAMPLED) -> list[list[int]]:
    return [list(completion.token_ids) for completion in engine.generate(PROMPTS, params)]


def restarts(engine: FlexGenLite) -> int:
    return int(engine.status().totals["restarts"])


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("family", ["gemma4-wrapper", "deepseek-v3"])
def test_a_model_with_windows_or_latents(family: str, runtime: Path, tmp_path: Path) -> None:
    """In each of its workers; what is kept of the tokens is where it was."""
    with start(make_model(family, tmp_path), layer_slots=2) as engine:
        expected = tokens(engine)
        for victim in WORKERS:
            job = engine.submit(PROMPTS, SAMPLED)
            time.sleep(0.15)
            workers_of(engine.engine_pid)[victim].send_signal(signal.SIGKILL)
            assert [list(c.token_ids) for c in job.results()] == expected
        assert restarts(engine) == len(WORKERS)


def test_a_killed_worker_is_started_again(
    model: Path, expected: list[list[int]], runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "flexgen_lite")
    with start(model, layer_slots=2) as engine:
        for number, victim in enumerate(WORKERS, start=1):
            before = workers_of(engine.engine_pid)
            job = engine.submit(PROMPTS, SAMPLED)
            time.sleep(0.15)
            before[victim].send_signal(signal.SIGKILL)
            assert [list(c.token_ids) for c in job.results()] == expected
            assert tokens(engine) == expected, "and it goes on"
            assert restarts(engine) == number
            after = workers_of(engine.engine_pid)
            assert {name for name in before if before[name].pid != after[name].pid} == {victim}
    lines = [record.getMessage() for record in caplog.records if "was killed by SIGKILL" in record.getMessage()]
    for line, victim in zip(lines, WORKERS, strict=True):
        assert line.startswith(victim) and "starting it again" in line


def test_an_attention_worker_killed_where_its_cache_is_in_int8(model: Path, runtime: Path) -> None:
    with start(model, kv_dtype="int8") as engine:
        expected = tokens(engine)
        job = engine.submit(PROMPTS, SAMPLED)
        time.sleep(0.15)
        workers_of(engine.engine_pid)["attention worker 1"].send_signal(signal.SIGKILL)
        assert [list(c.token_ids) for c in job.results()] == expected
        assert restarts(engine) == 1


def test_a_worker_killed_while_idle(model: Path, expected: list[list[int]], runtime: Path) -> None:
    with start(model, stage_weights=True, layer_slots=2) as engine:
        assert tokens(engine) == expected
        for number, victim in enumerate(WORKERS, start=1):
            workers_of(engine.engine_pid)[victim].kill()
            assert tokens(engine) == expected
            assert restarts(engine) == number


def test_all_workers_killed_at_once(model: Path, expected: list[list[int]], runtime: Path) -> None:
    with start(model, layer_slots=2) as engine:
        job = engine.submit(PROMPTS, SAMPLED)
        time.sleep(0.2)
        for process in workers_of(engine.engine_pid).values():
            process.kill()
        assert [list(c.token_ids) for c in job.results()] == expected
        assert restarts(engine) == 4


def test_a_worker_that_hangs_is_replaced(model: Path, expected: list[list[int]], runtime: Path) -> None:
    with start(model, worker_timeout=2) as engine:
        for victim in ("attention worker 0", "compute worker"):
            job = engine.submit(PROMPTS, SAMPLED)
            workers_of(engine.engine_pid)[victim].send_signal(signal.SIGSTOP)
            assert [list(c.token_ids) for c in job.results()] == expected
        assert restarts(engine) == 2


def test_a_worker_lost_often_while_another_holds_up_the_work(
    model: Path, expected: list[list[int]], runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It started well each time: that nothing got done in between is not its fault."""
    caplog.set_level(logging.INFO, "flexgen_lite")

    def is_ready(victim: psutil.Process) -> bool:
        return f"attention worker 1 (process {victim.pid}) is ready" in caplog.messages

    with start(model) as engine:
        workers = workers_of(engine.engine_pid)
        job = engine.submit(PROMPTS, SAMPLED)
        time.sleep(0.1)
        workers["compute worker"].suspend()
        for number in range(6):
            wait_until(lambda: "attention worker 1" in workers_of(engine.engine_pid))
            victim = workers_of(engine.engine_pid)["attention worker 1"]
            wait_until(lambda number=number, victim=victim: number == 0 or is_ready(victim))
            victim.kill()
            wait_until(lambda number=number: restarts(engine) == number + 1)
        workers["compute worker"].resume()
        assert [list(c.token_ids) for c in job.results()] == expected
        assert restarts(engine) == 6


FAULTS = {
    "resident": [
        Fault("open", 1),
        Fault("load", 3),
        Fault("pack", 2, after=True),
        Fault("advance", 20, "SIGSEGV", after=True),
        Fault("attend", 17, "raise", worker="worker 1"),
    ],
    "streamed": [
        Fault("leave", 5),
        Fault("load", 40, after=True),
        Fault("advance", 33, "raise", after=True),
        Fault("attend", 40, after=True, worker="worker 1"),
    ],
    "staged": [Fault("advance", 15, "exit"), Fault("load", 21, "SIGSEGV"), Fault("attend", 31, worker="worker 0")],
    "on the device alone": [
        Fault("load", 4, "SIGSEGV"),
        Fault("advance", 15),
        Fault("attend", 31, worker="worker 0"),
    ],
    "projections on the CPU": [
        Fault("advance", 3),
        Fault("advance", 27, "SIGSEGV", after=True),
        Fault("load", 7, "SIGSEGV"),
        Fault("load", 31, after=True),
        Fault("attend", 31, worker="worker 0"),
    ],
    "several micro-batches": [
        Fault("advance", 50, after=True),
        Fault("attend", 50, "exit", worker="worker 0"),
        Fault("begin", 4, after=True, worker="worker 1"),
    ],
}


@pytest.mark.parametrize("layout", FAULTS)
def test_faults_in_the_middle_of_the_work(
    layout: str,
    model: Path,
    expected: list[list[int]],
    runtime: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inject(monkeypatch, tmp_path / "faults", *FAULTS[layout])
    with start(model, **OPTIONS[layout]) as engine:
        for _ in until_all_struck(tmp_path / "faults", len(FAULTS[layout])):
            assert tokens(engine) == expected
        assert restarts(engine) == len(FAULTS[layout])
    assert "has no effect" not in caplog.text


def test_a_schedule_of_faults_drawn_at_random(
    model: Path, expected: list[list[int]], runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(20)
    faults = [
        Fault(
            draw.choice(["advance", "attend", "load", "begin", "leave"]),
            draw.randrange(1, 60),
            draw.choice(["SIGKILL", "SIGSEGV", "exit", "raise"]),
            after=draw.random() < 0.5,
        )
        for _ in range(8)
    ]
    inject(monkeypatch, tmp_path / "faults", *faults)
    with start(model, layer_slots=3, micro_batches=2) as engine:
        assert tokens(engine) == expected
        # A fault may strike both attention workers before either has left its mark.
        assert restarts(engine) >= len(struck(tmp_path / "faults")) >= 3


def test_a_request_that_kills_its_worker_is_given_up_alone(
    model: Path, expected: list[list[int]], runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = {token for prompt, out in zip(PROMPTS, expected, strict=True) for token in (*prompt, *out)}
    poison = next(token for token in range(5, 1000) if token not in used)
    inject(monkeypatch, tmp_path / "faults", Fault("advance", token=poison, again=True))
    prompts = [*PROMPTS[:3], [7, poison, 8], *PROMPTS[3:6]]
    with start(model) as engine:
        found = engine.generate(prompts, SAMPLED)
        assert [c.finish_reason == "error" for c in found] == [prompt == [7, poison, 8] for prompt in prompts]
        assert "times in a row a worker was lost while it computed this request alone" in (found[3].error or "")
        assert [list(c.token_ids) for c in found if c.error is None] == expected[:6]
        assert tokens(engine) == expected


def test_a_pass_that_is_too_large_is_not_tried_for_every_token(
    model: Path, expected: list[list[int]], runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, tmp_path / "faults", Fault("advance", rows=12, again=True))
    prompts = [prompt[:1] for prompt in PROMPTS[:14]]
    with start(model) as engine:
        found = engine.generate(prompts, SAMPLED)
        assert [c.finish_reason for c in found] == ["length"] * 14
        assert restarts(engine) == 3


def test_a_worker_that_cannot_be_started_ends_the_engine(
    model: Path, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, tmp_path / "faults", Fault("open", again=True))
    with pytest.raises(EngineError, match=r"4 times in a row before it had started; .* was killed by SIGKILL"):
        start(model)


def test_a_failure_that_has_nothing_to_do_with_requests_ends_the_engine(
    model: Path, runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request gets an error row for it, so that the rest of the job can be done when it is mended."""
    monkeypatch.setattr(supervisor, "MOST_LOSSES", 1)  # further engines would end alike
    inject(monkeypatch, tmp_path / "faults", Fault("attend", again=True))
    with FlexGenLite(model, dtype="float32", attention_threads=1) as engine:
        job = engine.submit([[5, 6, 7]] * 8, SAMPLED)
        with pytest.raises(EngineError, match=r"each of 5 requests in a row.* worker 0 .* was killed by SIGKILL"):
            job.results()
        assert job.failed == 0

"""A worker lost where sequences keep other state than keys and values: the same tokens as if nothing had happened.

A pass that is begun again meets states that the lost one has written in part.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite import FlexGenLite, SamplingParams
from tests.engine_processes import workers_of
from tests.fault_injection import Fault, inject, struck, until_all_struck
from tests.tiny_models import make_model, ragged_prompts

WORKERS = ("compute worker", "disk loader", "attention worker 1")
PROMPTS = ragged_prompts(24, longest=40)
SAMPLED = SamplingParams(max_tokens=16, temperature=0.9, top_k=50, seed=7, ignore_eos=True)
HYBRIDS = ("qwen3.5", "nemotron-h")
OPTIONS: dict[str, dict[str, Any]] = {
    "resident": {},
    "streamed": {"layer_slots": 2},
    "staged": {"stage_weights": True, "layer_slots": 2},
    "projections": {"stage_weights": True, "layer_slots": 2, "device_slots": 2, "cpu_projections": "qkv"},
    "chunks": {"layer_slots": 2, "micro_batches": 2, "micro_batch_tokens": 24, "max_sequences": 12},
}
FAULTS = {
    "resident": [
        Fault("put", 1),
        Fault("put", 21, after=True),
        Fault("mix", 14, "raise"),
        Fault("advance", 23, after=True),
        Fault("attend", 5, worker="worker 1"),
    ],
    "streamed": [Fault("put", 30, "SIGSEGV"), Fault("leave", 2), Fault("load", 17), Fault("mix", 9, after=True)],
    "staged": [Fault("put", 19, after=True), Fault("load", 9, "SIGSEGV"), Fault("attend", 7, worker="worker 0")],
    "projections": [Fault("put", 19, after=True), Fault("load", 9, "SIGSEGV"), Fault("advance", 13)],
    "chunks": [
        Fault("put", 9, after=True),
        Fault("put", 40),
        Fault("advance", 31, "exit"),
        Fault("begin", 4, after=True, worker="worker 1"),
    ],
}


def start(model: Path, **options: Any) -> FlexGenLite:
    return FlexGenLite(model, attention_workers=2, attention_threads=1, dtype="float32", device="cpu", **options)


def tokens(engine: FlexGenLite) -> list[list[int]]:
    return [list(completion.token_ids) for completion in engine.generate(PROMPTS, SAMPLED)]


def restarts(engine: FlexGenLite) -> int:
    return int(engine.status().totals["restarts"])


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[int]]]]:
    """By family: a model, and the tokens of a run without a loss."""
    found = {}
    for family in HYBRIDS:
        model = make_model(family, tmp_path_factory.mktemp("model"))
        with start(model) as engine:
            found[family] = model, tokens(engine)
    return found


@pytest.mark.parametrize("family", HYBRIDS)
def test_a_killed_worker_is_started_again(family: str, hybrids: dict[str, Any], runtime: Path) -> None:
    model, expected = hybrids[family]
    with start(model, layer_slots=2) as engine:
        for number, victim in enumerate(WORKERS, start=1):
            job = engine.submit(PROMPTS, SAMPLED)
            time.sleep(0.15)
            workers_of(engine.engine_pid)[victim].send_signal(signal.SIGKILL)
            assert [list(c.token_ids) for c in job.results()] == expected
            assert restarts(engine) == number


@pytest.mark.parametrize("layout", FAULTS)
@pytest.mark.parametrize("family", HYBRIDS)
def test_faults_in_the_middle_of_the_work(
    family: str,
    layout: str,
    hybrids: dict[str, Any],
    runtime: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Before and after states are written: of the first layers of a pass, not of the others."""
    model, expected = hybrids[family]
    inject(monkeypatch, tmp_path / "faults", *FAULTS[layout])
    with start(model, **OPTIONS[layout]) as engine:
        for _ in until_all_struck(tmp_path / "faults", len(FAULTS[layout])):
            assert tokens(engine) == expected
        assert restarts(engine) == len(FAULTS[layout])
    assert "has no effect" not in caplog.text


def test_a_model_without_attention(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mamba2", tmp_path / "model")
    with start(model) as engine:
        expected = tokens(engine)
    inject(monkeypatch, tmp_path / "faults", Fault("put", 27), Fault("advance", 9, after=True), Fault("load", 7))
    with start(model, layer_slots=2) as engine:
        assert tokens(engine) == expected
        workers_of(engine.engine_pid)["attention worker 0"].kill()
        assert tokens(engine) == expected
        assert restarts(engine) == len(struck(tmp_path / "faults")) + 1 == 4


def test_passes_that_are_too_large_are_followed_by_smaller_ones(
    hybrids: dict[str, Any], runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts go through in other chunks than before the losses."""
    model, expected = hybrids["qwen3.5"]
    most = 30
    inject(monkeypatch, tmp_path / "faults", Fault("advance", rows=most, again=True))
    short = [number for number, prompt in enumerate(PROMPTS) if len(prompt) <= most]
    with start(model) as engine:
        found = engine.generate([PROMPTS[number] for number in short], SAMPLED)
        assert [list(c.token_ids) for c in found] == [expected[number] for number in short]
        assert restarts(engine) > 1

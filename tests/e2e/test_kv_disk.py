"""Sequences that are parked on disk, through the real processes: the tokens of an engine that has room for all, in each
family of models; and prompts whose beginning an engine before this one has computed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite import EngineError, FlexGenLite, SamplingParams
from flexgen_lite.report.page import write_report
from flexgen_lite.report.trace_reader import read_events
from tests.tight_engine import SETTINGS, expect_short_answers, tight_engine, tokens_of
from tests.tiny_models import make_model, ragged_prompts

SAMPLED = SamplingParams(max_tokens=90, temperature=0.8, seed=3, ignore_eos=True)
PROMPTS = ragged_prompts(24, longest=40)
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3": {"attention_workers": 1},
    "deepseek-v3": {},
    "qwen3.5": {},
    "nemotron-h": {},
    "opt": {"kv_dtype": "int8"},
}


def roomy_tokens(model: Path, params: SamplingParams = SAMPLED, **changes: Any) -> list[list[list[int]]]:
    with FlexGenLite(model, **SETTINGS | changes) as engine:
        return [[list(output.token_ids) for output in c.outputs] for c in engine.generate(PROMPTS, params)]


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    options = FAMILIES[family]
    model = make_model(family, tmp_path / "model", **(WINDOWS if family == "gemma3" else {}))
    expected = roomy_tokens(model, **options)
    with tight_engine(model, kv_disk="1GiB", kv_disk_dir=str(tmp_path / "kv"), **options) as (_, client):
        assert tokens_of(client, PROMPTS, SAMPLED) == expected
        totals = client.status().totals
    assert totals["parked_sequences"] > 0 and totals["kv_disk_failures"] == 0
    assert totals["fetched_sequences"] == totals["parked_sequences"] <= totals["sent_back"]
    assert totals["kv_disk_written_bytes"] >= totals["kv_disk_read_bytes"] > 0


def test_nothing_is_left_and_the_trace_tells_of_all(tmp_path: Path) -> None:
    model, trace = make_model("llama", tmp_path / "model"), tmp_path / "trace.json"
    options = {"kv_disk": "1GiB", "kv_disk_dir": str(tmp_path / "kv"), "prefix_caching": False, "trace": str(trace)}
    with tight_engine(model, **options) as (_, client):
        tokens_of(client, PROMPTS, SAMPLED)
        parked = client.status().totals["parked_sequences"]
    assert list((tmp_path / "kv").iterdir()) == []
    spans = [event["name"] for event in read_events(trace) if event["ph"] == "X"]
    assert sum(name.startswith("park ") for name in spans) == parked > 0
    assert sum(name.startswith("fetch ") for name in spans) == parked
    write_report(trace, tmp_path / "report.html")
    assert "KV on disk" in trace.read_text()


def test_several_answers_logprobs_and_streams(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "model")
    params = replace(SAMPLED, n=2, logprobs=2, prompt_logprobs=1)

    def of(completions: Any, numbers: Callable[[dict[int, float]], Any]) -> list[Any]:
        assert [c.error for c in completions] == [None] * len(PROMPTS)

        def all_of(found: list[Any]) -> list[Any]:
            return [None if of is None else numbers({t: of[t].logprob for t in of}) for of in found]

        return [
            ([(list(o.token_ids), all_of(o.logprobs)) for o in c.outputs], all_of(c.prompt_logprobs))
            for c in completions
        ]

    with FlexGenLite(model, **SETTINGS) as engine:
        expected = of(engine.generate(PROMPTS, params), lambda values: pytest.approx(values, abs=1e-4))
    with tight_engine(model, kv_disk="1GiB", kv_disk_dir=str(tmp_path / "kv")) as (_, client):
        assert of(client.submit(PROMPTS, params).results(), dict) == expected
        assert client.status().totals["parked_sequences"] > 0


def test_a_disk_with_little_room(tmp_path: Path) -> None:
    """Some are parked, the others computed again: one after the other has the few slots there are."""
    model = make_model("llama", tmp_path / "model")
    expected = roomy_tokens(model)
    with pytest.raises(
        EngineError, match=r"kv_disk=1\.0 KiB has no room .*: give at least ([\d.]+ \w+), or leave it out"
    ):
        FlexGenLite(model, kv_disk="1KiB", kv_disk_dir=str(tmp_path / "kv"), **SETTINGS)
    with tight_engine(model, kv_disk="512KiB", kv_disk_dir=str(tmp_path / "kv"), attention_workers=1) as (_, client):
        for _ in range(2):
            assert tokens_of(client, PROMPTS, SAMPLED) == expected
            expect_short_answers(client)
        assert client.status().totals["kv_disk_failures"] == 0


# ------------------------------------------------------------------------------------------------ prefixes

HEAD = [(7 * n) % 150 + 5 for n in range(200)]
ALIKE = [[*HEAD, *prompt] for prompt in PROMPTS[:12]]
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


def long_model(family: str, folder: Path) -> Path:
    return make_model(family, folder, max_position_embeddings=512)


def alike(engine: FlexGenLite) -> list[list[int]]:
    completions = engine.generate(ALIKE, GREEDY)
    assert [c.error for c in completions] == [None] * len(ALIKE)
    return [list(c.token_ids) for c in completions]


def run(model: Path, folder: Path, **changes: Any) -> tuple[list[list[int]], dict[str, float]]:
    with FlexGenLite(model, **SETTINGS | {"kv_disk": "64MiB", "kv_disk_dir": str(folder)} | changes) as engine:
        return alike(engine), dict(engine.status().totals)


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("gemma3", {}), ("deepseek-v3", {"kv_dtype": "int8"})])
def test_the_next_engine_does_not_compute_what_one_has_computed(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = long_model(family, tmp_path / "model")
    with FlexGenLite(model, **SETTINGS | options) as engine:
        expected = alike(engine)
    first, before = run(model, tmp_path / "kv", **options)
    again, after = run(model, tmp_path / "kv", **options)
    assert first == again == expected
    assert before["disk_prefix_blocks_stored"] > 0
    assert after["disk_prefix_tokens"] >= 192, "the beginning that all have"
    assert after["prompt_tokens"] < before["prompt_tokens"] - 150


def test_what_is_damaged_is_computed(tmp_path: Path) -> None:
    model = long_model("llama", tmp_path / "model")
    expected, _ = run(model, tmp_path / "kv")
    (path,) = (tmp_path / "kv").glob("*.prefixes")
    data = bytearray(path.read_bytes())
    start = 8192 if len(data) < 100_000 else len(data) // 2
    for at in range(start, len(data), 4096):
        data[at] ^= 0xFF
    path.write_bytes(data)
    found, totals = run(model, tmp_path / "kv")
    assert found == expected and totals["kv_disk_failures"] > 0


def test_prefixes_of_models_are_kept_apart(tmp_path: Path) -> None:
    """Of the same shape, in the same place; and those of other kinds of KV of the same model."""
    model = long_model("llama", tmp_path / "model")
    run(model, tmp_path / "kv")
    _, totals = run(model, tmp_path / "kv", kv_dtype="int8")
    assert totals["disk_prefix_tokens"] == 0
    for path in (tmp_path / "model").glob("*.safetensors"):
        path.touch()
    _, totals = run(model, tmp_path / "kv")
    assert totals["disk_prefix_tokens"] == 0
    assert len(list((tmp_path / "kv").iterdir())) == 3


def test_a_second_engine_goes_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "flexgen_lite")
    model = long_model("llama", tmp_path / "model")
    expected, _ = run(model, tmp_path / "kv")
    options = SETTINGS | {"kv_disk": "64MiB", "kv_disk_dir": str(tmp_path / "kv")}
    with FlexGenLite(model, **options) as first, FlexGenLite(model, **options) as second:
        assert alike(second) == expected
        totals = second.status().totals
        assert totals["disk_prefix_tokens"] == totals["kv_disk_written_bytes"] == 0
        until = time.monotonic() + 30
        while not any("another engine of this model" in text for text in caplog.messages) and time.monotonic() < until:
            time.sleep(0.1)
        assert alike(first) == expected
        assert first.status().totals["disk_prefix_tokens"] > 0
    assert any("another engine of this model" in message for message in caplog.messages)


def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    model = long_model("llama", tmp_path / "model")
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"kv_disk_dir=.*file.* cannot be written to .*: give another directory"):
        FlexGenLite(model, kv_disk="64MiB", kv_disk_dir=str(tmp_path / "file"), **SETTINGS)

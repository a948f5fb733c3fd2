"""Projections on the CPU beside a device, rehearsed with the CPU in the device's place: the same greedy tokens as
Transformers, and their weights are copied to the device only where a pass has many rows of prompts."""

from __future__ import annotations

import re
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite import Client, FlexGenLite, SamplingParams
from flexgen_lite.memory.projection_units import layers_with_projections, units_of
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.wire.worker_messages import OpenModel
from flexgen_lite.workers.compute.device import open_device
from flexgen_lite.workers.compute.host_projections import MOST_PROMPT_ROWS
from flexgen_lite.workers.compute.model_open import open_model
from tests.tiny_models import SMALL_PASSES, make_model, ragged_prompts, reference_tokens

MAX_TOKENS = 10
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
STAGED: dict[str, Any] = {"stage_weights": True, "layer_slots": 2, "cpu_projections": "qkv", "device": "cpu"}
SETTINGS: dict[str, Any] = {**SMALL_PASSES, **STAGED, "device_slots": 2, "micro_batch_tokens": 64}
FAMILIES = (
    "opt", "gpt2", "gpt-neox", "gpt-bigcode", "llama", "qwen3", "phi3", "gemma3", "gpt-oss", "qwen3-moe", "deepseek-v3",
    "longcat-two-calls", "diffllama-two-calls", "gemma4-shared-kv", "gemma4-wrapper", "qwen3.5", "nemotron-h",
)  # fmt: skip


def spec_of(model: Path, run_dir: Path) -> ModelSpec:
    return open_model(
        OpenModel(str(model), "auto", "float32", "cpu", False, None), open_device("cpu"), str(run_dir)
    ).spec


def split(spec: ModelSpec) -> tuple[list[int], list[int]]:
    """Bytes of each layer that go to the device in every pass, and of its projections."""
    layers = layers_with_projections(spec)
    units = units_of(spec, layers)
    apart = dict(zip(layers, units[spec.num_layers + 1 :], strict=True))
    return (
        [unit.num_bytes for unit in units[: spec.num_layers]],
        [apart[layer].num_bytes if layer in apart else 0 for layer in range(spec.num_layers)],
    )


def until_uploaded(engine: FlexGenLite, num_bytes: int) -> None:
    """Copies go on into the next pass, as far as there are slots."""
    deadline = time.monotonic() + 30
    while (found := engine.status().totals["uploaded_bytes"]) != num_bytes:
        assert time.monotonic() < deadline, f"{found} bytes were copied instead of {num_bytes}"
        time.sleep(0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_transformers(family: str, tmp_path: Path) -> None:
    """Layers from the disk, two micro-batches, prompts in chunks; passes with many rows of prompts, and without."""
    more_layers = {"num_layers": 3, "num_hidden_layers": 6} if family == "longcat-two-calls" else {}
    model = make_model(family, tmp_path / "model", **more_layers)
    prompts = ragged_prompts(12, longest=70)
    with FlexGenLite(model, **SETTINGS) as engine:
        completions = engine.generate(prompts, GREEDY)
        totals = engine.status().totals
    assert [c.error for c in completions] == [None] * len(prompts)
    assert [list(c.token_ids) for c in completions] == reference_tokens(model, prompts, MAX_TOKENS)
    passing, apart = split(spec_of(model, tmp_path))
    least, whole = sum(passing) * totals["passes"], sum(passing + apart) * totals["passes"]
    assert least < totals["uploaded_bytes"] < whole, "projections were copied in some passes, but not in all"


@pytest.mark.parametrize("family", ["llama", "gpt2", "deepseek-v3", "qwen3.5"])
def test_what_is_copied_to_the_device(family: str, tmp_path: Path) -> None:
    """To the byte: decode passes leave the projections where they are, those with many rows of prompts do not."""
    model = make_model(family, tmp_path / "model")
    spec = spec_of(model, tmp_path)
    passing, apart = split(spec)
    assert sum(apart) > 0.1 * sum(passing)
    slots, settings = 3, {"dtype": "float32", "micro_batches": 2, "micro_batch_tokens": 64, "max_sequences": 8}
    short = [prompt[:5] for prompt in ragged_prompts(8, longest=20)]
    long = [[7] * (MOST_PROMPT_ROWS // 2 + 1)] * 2
    with FlexGenLite(model, **STAGED, **settings, device_slots=min(slots, spec.num_layers - 1)) as engine:
        slots = min(slots, spec.num_layers - 1)
        answers = [list(c.token_ids) for c in engine.generate(short, GREEDY)]
        passes = int(engine.status().totals["passes"])
        copied = spec.units[-1].num_bytes + sum(islice(cycle(passing), passes * spec.num_layers + slots))
        until_uploaded(engine, copied)
        answers += [list(c.token_ids) for c in engine.generate(long, GREEDY)]
        passes = int(engine.status().totals["passes"]) - passes
        copied += passes * sum(passing) + sum(apart)
        until_uploaded(engine, copied)
    assert passes == MAX_TOKENS
    assert answers == reference_tokens(model, [*short, *long], MAX_TOKENS)


def test_in_bfloat16(tmp_path: Path) -> None:
    """The same kernels as without, so the same tokens to the last bit."""
    model, prompts = make_model("llama", tmp_path / "model"), ragged_prompts(12, longest=40)
    found = []
    for chosen in ("none", "qkv"):
        with FlexGenLite(model, **SETTINGS | {"dtype": "bfloat16", "cpu_projections": chosen}) as engine:
            found.append([list(c.token_ids) for c in engine.generate(prompts, GREEDY)])
    assert found[0] == found[1]


LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "streamed": ({}, "projections of 6 layers on the CPU"),
    "in RAM": ({"layer_slots": "auto"}, "6 of 6 layers in RAM, 0 also on the device, .*projections of 6 layers"),
    "on the device alone": ({"device_slots": 5}, "2 on the device alone, .*projections of 4 layers"),
    "on the device and in RAM": (
        {"device_slots": 5, "layer_slots": "auto"},
        "6 of 6 layers in RAM, 2 also on the device, .*projections of 4 layers",
    ),
    "all on the device": ({"device_slots": 6}, "has no effect"),
    "nothing staged": ({"stage_weights": False}, "has no effect"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_that_stay(layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On the device, and in main memory: some of the layers' projections are computed on the CPU, or none."""
    settings, told = LAYOUTS[layout]
    model, prompts = make_model("gemma4-shared-kv", tmp_path / "model"), ragged_prompts(6, longest=40)
    with FlexGenLite(model, **SETTINGS | settings) as engine, Client(engine.endpoint) as client:
        plan = client.welcome.plan
        assert [list(c.token_ids) for c in engine.generate(prompts, GREEDY)] == reference_tokens(
            model, prompts, MAX_TOKENS
        )
    assert re.search(told, caplog.text if told == "has no effect" else plan)
    assert ("projections of" in plan) == ("has no effect" not in caplog.text)

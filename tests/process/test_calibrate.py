"""Real workers are timed at what passes are made of, for every kind of layer; what they would do is then predicted with
as many passes as an engine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexgen_lite import FlexGenLite, SamplingParams
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.job import JobRequest
from flexgen_lite.cost.kinds import columns_to_measure, segment_kinds
from flexgen_lite.cost.pass_work import Work
from flexgen_lite.cost.rates import Rates
from flexgen_lite.engine.calibration import Calibration
from flexgen_lite.engine.setup import Setup
from flexgen_lite.launcher.calibrate import calibrate
from flexgen_lite.launcher.forecast import Forecaster
from flexgen_lite.plan.machine import inspect_machine
from tests.tiny_hybrids import HYBRIDS
from tests.tiny_models import make_model, ragged_prompts

OPTIONS: dict[str, dict[str, Any]] = {
    "gemma3": {"attention_workers": 2},
    "deepseek-v3": {"layer_slots": 2},
    "qwen3.5": {"micro_batch_tokens": 32, "micro_batches": 2},
    "llama": {"stage_weights": True},
    "opt": {"stage_weights": True, "cpu_projections": "qkv"},
}
assert "qwen3.5" in HYBRIDS


@pytest.mark.parametrize("family", OPTIONS)
def test_every_kind_of_column_is_measured(family: str, tmp_path: Path) -> None:
    model = make_model(family, tmp_path)
    config = EngineConfig(model=str(model), ram="1GiB", **OPTIONS[family])
    found = calibrate(config)
    spec, rates = found.opened.spec, found.rates
    projected = config.cpu_projections == "qkv"
    orders = ("packed", "raw") if not config.stage_weights else ("raw", "host") if projected else ("raw",)
    assert {name.partition(" ")[0] for name in rates.segments} == set(orders)
    assert columns_to_measure(spec, 100) <= 16
    for order in orders:
        for before, after in segment_kinds(spec)[:-1]:
            assert f"{order} {before}>{after}" in rates.segments
    assert all(one.prompt.at(64) > 0 and one.decode.at(1) > 0 for one in rates.segments.values())
    assert rates.head.at(1) > 1e-6 and rates.disk > 0 and set(rates.load) >= {0, -1}
    assert bool(rates.upload) == bool(config.stage_weights)
    assert Calibration.from_dict(found.to_dict()) == found

    prompts = ragged_prompts(40, longest=50)
    with FlexGenLite(str(model), ram="1GiB", **OPTIONS[family]) as engine:
        engine.generate(prompts, SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))
        passes = engine.status().totals["passes"]
    requests = [JobRequest(len(prompt), 6, 6) for prompt in prompts]
    forecast = Forecaster(found, inspect_machine(), None, requests).forecast(config)
    assert len(forecast.setup.plan.projection_layers) == (4 if projected else 0)
    _check_projections(forecast.setup, rates)
    job = forecast.job
    assert job is not None and passes - 2 <= job.passes <= passes, "a busy machine may begin before all have come"
    assert 0.001 < job.seconds < 100 and job.done_at[-1] == pytest.approx(job.seconds)


def test_projections_on_the_cpu_are_predicted_as_they_run(tmp_path: Path) -> None:
    """A job of single tokens, but for its first pass, with the CPU in the device's place."""
    model, most = make_model("llama", tmp_path), 4.0  # times as long, or as short, on a busy machine
    prompts = [[5 + n, 6, 7] for n in range(24)]
    for chosen in ("none", "qkv"):
        settings: dict[str, Any] = {"stage_weights": True, "device": "cpu", "cpu_projections": chosen, "ram": "1GiB"}
        config = EngineConfig(model=str(model), **settings)
        found = calibrate(config)
        with FlexGenLite(str(model), **settings) as engine:
            engine.generate(prompts, SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
            totals = engine.status().totals
        job = Forecaster(found, inspect_machine(), None, [JobRequest(3, 40, 40)] * 24).forecast(config).job
        assert job is not None and 1 / most < job.seconds / totals["busy_seconds"] < most


def _check_projections(setup: Setup, rates: Rates) -> None:
    """They are loaded by themselves, in as long as it takes more with them, and not copied."""
    spec, layers = setup.spec, setup.plan.projection_layers
    work = Work(spec, setup.plan, rates)
    for unit, layer in enumerate(layers, start=spec.num_layers + 1):
        assert work.load(layer) + work.load(unit) == pytest.approx(rates.load[0])
        assert work.load(unit) > 0.1 * rates.load[0] and work.upload(layer) < 0.9 * rates.upload[0]

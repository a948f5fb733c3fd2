"""Which settings a job would be fastest with: searched over what passes of them would take.

The search goes key by key, from what the plan's own rules choose, and ends where no change of one helps. Keys that are
given are left as they are.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.launcher.forecast import Forecast, Forecaster, longest_sequence
from flexgen_lite.plan.plan import SHAPES, PlanError

SEQUENCES = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
SLOTS = (2, 3, 4)
WORTH = 1.03  # times as fast as the rules' choice: predictions are no better than that
STEP = 1.005  # times as fast, for a change to be taken
ROUNDS = 2
FOLLOWED = 2  # rounds of requests, to compare settings by
SECONDS = 20.0
ROOM = 0.97  # of the budget, with which settings have to be possible as well


@dataclass(frozen=True, slots=True)
class Policy:
    """
    Attributes:
        settings: of keys of the configuration; none: the rules' choice stands.
        forecast: of the job with them.
        gain: times as fast as with the rules' choice; None: that cannot be.
    """

    settings: dict[str, Any]
    forecast: Forecast
    gain: float | None


def search(forecaster: Forecaster, config: EngineConfig) -> Policy:
    """What is found within SECONDS or so.

    Raises:
        PlanError: the budget does not hold even the smallest plan.
        ValueError: there are no requests, or none that the engine would take.
    """
    until = time.monotonic() + SECONDS
    base = forecaster.forecast(config, FOLLOWED)
    longest, best, settings = longest_sequence(base.setup), base, dict[str, Any]()
    for _ in range(ROUNDS):
        before = dict(settings)
        for changes in _changes(config, base):
            for change in changes:
                if time.monotonic() > until:
                    break
                tried = settings | change
                found = _try(forecaster, config, tried, longest)
                if found is not None and rate_of(found) > STEP * rate_of(best):
                    best, settings = found, tried
        if settings == before:
            break
    gain = rate_of(best) / rate_of(base)
    if gain < WORTH or _try(forecaster, config, settings | {"ram": int(ROOM * base.setup.plan.ram)}, 0) is None:
        settings, gain = {}, 1.0  # what just fits may not when the engine starts
    return Policy(settings, forecaster.forecast(config.model_copy(update=settings)), gain)


def _changes(config: EngineConfig, base: Forecast) -> list[list[dict[str, int]]]:
    """By group of keys that are free, what each may become."""
    found = []
    plan = base.setup.plan
    if config.max_sequences is None:
        found.append([{"max_sequences": count} for count in SEQUENCES if count != plan.max_sequences])
    if config.micro_batch_tokens is None and config.micro_batches is None:
        shapes = dict.fromkeys((*SHAPES, *((tokens, 1) for tokens, _ in SHAPES)))
        found.append([{"micro_batch_tokens": tokens, "micro_batches": count} for tokens, count in shapes])
    if config.layer_slots is None and plan.layer_slots:
        found.append([{"layer_slots": count} for count in SLOTS if count < base.setup.spec.num_layers])
    return found


def _try(forecaster: Forecaster, config: EngineConfig, settings: dict[str, Any], longest: int) -> Forecast | None:
    """None where that cannot be, or takes no sequences of `longest` tokens."""
    sequences, rows = settings.get("max_sequences", 0), settings.get("micro_batch_tokens", 0)
    if rows and sequences > rows * settings.get("micro_batches", 1):
        return None
    try:
        found = forecaster.forecast(config.model_copy(update=settings), FOLLOWED)
    except PlanError:
        return None
    return None if found.job is None or longest_sequence(found.setup) < longest else found


def rate_of(found: Forecast) -> float:
    """Requests per second, loading counted."""
    if found.job is None:
        raise ValueError("the engine would take none of the requests: they are too long")
    return found.job.requests / (found.job.load + found.job.seconds)

"""Settings that a user allows beside those that are configured: they change what is computed, or how fast it is."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen_lite.config.engine import EngineConfig, parse_setting
from flexgen_lite.config.problems import ConfigError
from flexgen_lite.launcher.calibrate import WITHOUT_EFFECT, settings_of
from flexgen_lite.text.shown import shown_text

MOST = 8  # combinations: each takes a minute to measure, once
SEARCHED = ("max_sequences", "micro_batches", "micro_batch_tokens", "layer_slots")
OTHER_ANSWERS = ("dtype", "kv_dtype", "activations", "quantization")  # these decide what is computed, by its beginning
NO_CHOICE = ("load_format", "max_model_len")  # other weights, or requests that are refused: nothing is faster for that


@dataclass(frozen=True, slots=True)
class Alternative:
    """
    Attributes:
        settings: what differs from the configuration; nothing: it is what is configured.
        config: with them.
    """

    settings: Mapping[str, Any]
    config: EngineConfig

    @property
    def changes_answers(self) -> bool:
        return any(key.startswith(OTHER_ANSWERS) for key in self.settings)

    def __str__(self) -> str:
        return settings_text(self.settings) or "as configured"


def alternatives(config: EngineConfig, allowed: Sequence[str]) -> list[Alternative]:
    """All combinations of what is configured, which is the first, and what is allowed.

    Args:
        allowed: settings, as "key=value"; those of one key are alternatives of each other.

    Raises:
        ConfigError: a key or value that there is not, that cannot be chosen, or that none of the combinations can have.
        ValueError: they are too many.
    """
    values = _values(config, allowed)
    count = math.prod(len(options) for options in values.values())
    if count > MOST:
        each = " x ".join(f"{len(options)} of {key}" for key, options in values.items())
        raise ValueError(
            f"--allow asks for {count} combinations ({each}, what is configured among them), {MOST} are allowed, for "
            "each is measured: allow fewer values, or give some as flags"
        )
    given, found, problem = json.loads(config.to_json()), list[Alternative](), None
    for combination in itertools.product(*values.values()):
        try:
            changed = EngineConfig(**{**given, **dict(zip(values, combination, strict=True))})
        except ConfigError as error:
            problem = problem or error
            continue
        if all(settings_of(changed) != settings_of(one.config) for one in found):
            found.append(alternative(config, changed))
    if "qkv" in values.get("cpu_projections", [])[1:] and all(one.config.cpu_projections != "qkv" for one in found):
        raise ConfigError({"cpu_projections": "--allow cpu_projections has no effect: no layer is copied to a device"})
    if problem is not None and not _all_occur(values, found):
        raise ConfigError(problem.problems, dict.fromkeys(problem.problems, " (from --allow)"))
    return found


def refuse_allowed(config: EngineConfig, allowed: Sequence[str]) -> None:
    """Where there are several engines. Raises ValueError."""
    if allowed:
        raise ValueError(
            f"--allow and engines={config.engines} exclude each other, for one engine alone is measured: give what "
            "`flexgen-lite plan` chooses without --engines as settings, or leave one of them out"
        )


def alternative(config: EngineConfig, changed: EngineConfig) -> Alternative:
    """`changed` beside what is configured."""
    keys = (key for key in EngineConfig.model_fields if getattr(changed, key) != getattr(config, key))
    return Alternative({key: getattr(changed, key) for key in keys}, changed)


def settings_text(settings: Mapping[str, Any]) -> str:
    """As they would be given."""
    return ", ".join(f"{key}={_value_text(value)}" for key, value in settings.items())


def _value_text(value: object) -> str:
    if value is None:
        return "auto"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _values(config: EngineConfig, allowed: Sequence[str]) -> dict[str, list[Any]]:
    """By key; the first is what is configured."""
    given = json.loads(config.to_json())
    found: dict[str, list[Any]] = {}
    for text in allowed:
        key, value = parse_setting(text)
        _check(key)
        options = found.setdefault(key, [given[key]])
        with contextlib.suppress(ConfigError):  # it is wrong, which is told later, or goes with another key's value
            value = json.loads(EngineConfig(**{**given, key: value}).to_json())[key]
        if value not in options:
            options.append(value)
    return found


def _check(key: str) -> None:
    """Raises ConfigError where it cannot be chosen."""
    name = shown_text(key)
    if key in SEARCHED:
        raise ConfigError({key: f"--allow {name} has no effect: it is searched anyway, unless it is given"})
    if key in WITHOUT_EFFECT or key in NO_CHOICE:
        flag = f"--{key.replace('_', '-')}" if key in ("model", "ram", "gpu") else f"--set {name}=..."
        raise ConfigError({key: f"--allow {name} is not possible, as nothing is to be chosen of it: give {flag}"})


def _all_occur(values: Mapping[str, Sequence[Any]], found: Sequence[Alternative]) -> bool:
    made = [json.loads(one.config.to_json()) for one in found]
    return all(
        any(one[key] == value for one in made)
        for key, options in values.items()
        for value in options
        if key != "cpu_projections"
    )

"""What `--allow` makes of a configuration."""

from __future__ import annotations

from typing import Any

import pytest

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.config.problems import ConfigError
from flexgen_lite.launcher.alternatives import alternatives


def config(**values: Any) -> EngineConfig:
    return EngineConfig(model="m", **values)


def names(config: EngineConfig, *allowed: str) -> list[str]:
    return [str(one) for one in alternatives(config, allowed)]


def test_values_of_a_key_are_alternatives_and_keys_combine() -> None:
    assert names(config()) == ["as configured"]
    found = names(config(), "quantization=int4", "quantization=int8", "kv-dtype=int8")
    assert found == [
        "as configured", "kv_dtype=int8", "quantization=int4", "kv_dtype=int8, quantization=int4",
        "quantization=int8", "kv_dtype=int8, quantization=int8",
    ]  # fmt: skip


def test_what_is_configured_is_no_alternative_of_itself() -> None:
    assert names(config(quantization="int4"), "quantization=int4", "quantization=auto") == [
        "as configured",
        "quantization=auto",
    ]
    assert names(config(), "compute_threads=auto", "attention_cpus=auto") == ["as configured"]
    assert names(config(device="cpu"), "cpu_projections=none") == ["as configured"]


def test_values_are_read_as_the_configuration_reads_them() -> None:
    (_, found) = alternatives(config(), ["attention_cpus=['0-1', [2]]"])
    assert found.config.attention_cpus == ((0, 1), (2,)) and found.config == config(attention_cpus=[[0, 1], [2]])
    assert str(found) == "attention_cpus=[[0,1],[2]]"
    assert [one.config.stage_weights for one in alternatives(config(), ["stage_weights=true"])] == [None, True]


def test_projections_are_an_alternative_where_layers_are_copied() -> None:
    staged = config(device="cpu", stage_weights=True)
    assert names(staged, "cpu_projections=qkv", "cpu_projections=none") == ["as configured", "cpu_projections=qkv"]
    assert names(config(device="cpu"), "cpu_projections=qkv", "stage_weights=true") == [
        "as configured",
        "stage_weights=true",
        "stage_weights=true, cpu_projections=qkv",
    ]


def test_combinations_that_conflict_are_left_out() -> None:
    assert names(config(), "quantization=int4", "quantization_group_size=64") == [
        "as configured",
        "quantization=int4",
        "quantization=int4, quantization_group_size=64",
    ]


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        (
            ["quantization=int5"],
            r"quantization='int5' is not allowed: give .* or \"int4\" \(from --allow\)",
        ),
        (["quantisation=int4"], "quantisation is not a configuration key: did you mean quantization"),
        (["quantization"], "is not a setting: write key=value"),
        (["compute_threads=0"], "compute_threads=0 is not allowed"),
        (["quantization_group_size=64"], "is for weights that are quantised here"),
        (["max_sequences=64"], "--allow max_sequences has no effect: it is searched anyway"),
        (["cpu_projections=qkv"], "--allow cpu_projections has no effect: no layer is copied to a device"),
        (["ram=8GiB"], "nothing is to be chosen of it: give --ram"),
        (["kv_disk=8GiB"], "nothing is to be chosen of it: give --set kv_disk="),
        (["load_format=dummy"], "--allow load_format is not possible"),
        (
            ["quantization=int4", "quantization=int8", "kv_dtype=int8", "compute_threads=1"],
            r"12 combinations \(3 of quantization x 2 of kv_dtype x 2 of compute_threads.*\), 8 are allowed.*fewer",
        ),
    ],
)
def test_what_cannot_be_allowed(allowed: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        alternatives(config(device="cpu"), allowed)
    assert isinstance(caught.value, ConfigError) == ("combinations" not in said)

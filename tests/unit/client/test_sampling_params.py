"""Sampling parameters: vLLM's names and defaults, and clear refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite import SamplingParams
from flexgen_lite.client.sampling_params import GREEDY
from flexgen_lite.wire.sampling import WireParams


def test_defaults_and_wire_form() -> None:
    assert SamplingParams().to_wire() == WireParams(16, 0, 1.0, 0, 1.0, None, (), False, True)
    assert GREEDY.to_wire().temperature == 0.0


def test_minus_one_and_zero_mean_all_tokens() -> None:
    assert SamplingParams(top_k=-1).to_wire() == SamplingParams(top_k=0).to_wire()


def test_values_arrive_with_the_types_of_the_wire() -> None:
    wire = SamplingParams(temperature=0, top_p=1, stop_token_ids=[5, 6], seed=7).to_wire()
    assert (type(wire.temperature), type(wire.top_p)) == (float, float)
    assert (wire.stop_token_ids, wire.seed) == ((5, 6), 7)


def test_the_documented_parameters_are_those_there_are() -> None:
    page = (Path(__file__).parents[3] / "docs" / "sampling.md").read_text()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `")]
    documented = {row[1].strip().strip("`"): row[2].strip() for row in rows}
    fields = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    assert documented.keys() == fields.keys()
    for name, default in fields.items():
        shown = "none" if default in (None, ()) else str(default).lower()
        assert documented[name] == ("drawn" if name == "seed" else shown)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().max_tokens = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "16"),
        ("max_tokens", True),
        ("min_tokens", -1),
        ("min_tokens", 17),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_k", -2),
        ("top_k", 1.0),
        ("top_p", 0),
        ("top_p", 1.01),
        ("seed", -1),
        ("seed", 1 << 63),
        ("stop_token_ids", 5),
        ("stop_token_ids", "5"),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [1.0]),
        ("ignore_eos", 1),
        ("min_p", 1.5),
        ("min_p", "0.1"),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("logit_bias", [1]),
        ("logit_bias", {"5": 1.0}),
        ("logit_bias", {5: "1"}),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("stop", 5),
        ("stop", [5]),
        ("stop", [""]),
        ("stop", "\ud800"),
        ("stop", ["x"] * 65),
        ("include_stop_str_in_output", 1),
        ("logprobs", 21),
        ("logprobs", True),
        ("skip_special_tokens", None),
    ],
)
def test_a_value_that_is_not_allowed_is_named(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{key}=") as caught:
        SamplingParams(**{key: value})
    assert "\n" not in str(caught.value)

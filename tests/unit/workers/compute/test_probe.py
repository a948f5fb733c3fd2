"""The probe's own tiny models of types that keep other state than keys and values."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from flexgen_lite.workers.compute import attention_call, experts, probe
from tests.tiny_hybrids import HYBRIDS
from tests.tiny_models import FAMILIES, SHAPE

PUBLISHED = ["mamba", "mamba2", "falcon_mamba", "nemotron_h", "bamba", "zamba2", "kimi_linear", "minimax", "qwen3_5"]


@pytest.fixture(autouse=True)
def registered() -> None:
    attention_call.register()
    experts.register()


@pytest.mark.parametrize("family", [*HYBRIDS, "qwen3.5-wrapper", "qwen3.5-moe-wrapper"])
def test_hybrids_are_proven(family: str) -> None:
    kind, sizes = FAMILIES[family]
    assert probe.prove(AutoConfig.for_model(kind, **({} if "text_config" in sizes else SHAPE) | sizes))


@pytest.mark.parametrize("kind", PUBLISHED)
def test_tiny_models_of_published_sizes_are_proven(kind: str) -> None:
    assert probe.prove(AutoConfig.for_model(kind))

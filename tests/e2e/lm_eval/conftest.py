"""Models that share their weights, and engines that share their tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexgen_lite import FlexGenLite
from tests.lm_eval_pair import (
    MAX_LENGTH,
    TWINS,
    Engine,
    Make,
)
from tests.tiny_models import make_model
from tests.tiny_tokenizers import IM_END, VOCAB, make_tokenizer


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Special tokens come often: the model has a taste for them."""
    directory = tmp_path_factory.mktemp("weights")
    make_model("llama", directory, num_hidden_layers=2, vocab_size=VOCAB, max_position_embeddings=MAX_LENGTH)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[IM_END] *= 2
        for weight, scale in ((model.lm_head.weight, 2), (model.model.embed_tokens.weight, 1)):
            weight[TWINS] = scale * weight[TWINS[0]]
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def make(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a model of the same weights with a tokenizer and a generation_config.json; {} is none."""

    def make(
        kind: str = "bytes", around: str = "nothing", generation: dict[str, Any] | None = None, **more: Any
    ) -> Path:
        directory = tmp_path_factory.mktemp("model") / "model"
        shutil.copytree(weights, directory)
        if generation:
            (directory / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
        elif generation is not None:
            (directory / "generation_config.json").unlink()
        return make_tokenizer(kind, around, directory, **more)

    return make


@pytest.fixture(scope="module")
def engine(make: Make) -> Iterator[Engine]:
    """Gives the endpoint of an engine that has a tokenizer of the kind, which matters where it reads texts."""
    engines: dict[str, FlexGenLite] = {}

    def get(kind: str) -> str:
        if kind not in engines:
            engines[kind] = FlexGenLite(make(kind), dtype="float32", attention_threads=1)
        return engines[kind].endpoint

    yield get
    for started in engines.values():
        started.close()

"""Layers that keep other state than keys and values: the rows and states of Transformers' own cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from flexgen_lite.workers.compute.mixers import (
    CONV,
    NOTHING,
    RECURRENT,
    Key,
    Mixer,
    StateSpan,
    is_mixer,
    read_projections,
)
from tests.tiny_models import SHAPE, make_model

WIDTH, LENGTHS, STEPS = SHAPE["hidden_size"], (1, 2, 9, 70), 3


class Store:
    """States by place and key."""

    def __init__(self) -> None:
        self.held: dict[tuple[int, Key], torch.Tensor] = {}

    def get(self, key: Key, places: Sequence[int]) -> torch.Tensor:
        return torch.stack([self.held[place, key] for place in places])

    def put(self, key: Key, places: Sequence[int], values: torch.Tensor) -> None:
        for place, value in zip(places, values, strict=True):
            self.held[place, key] = value.clone()


def model_and_mixer(family: str, directory: Path) -> tuple[Any, nn.Module]:
    model = AutoModelForCausalLM.from_pretrained(make_model(family, directory), dtype=torch.float32).eval()
    return model, next(module for module in model.modules() if is_mixer(module))


def drawn(count: int, seed: int) -> torch.Tensor:
    return torch.randn((1, count, WIDTH), generator=torch.Generator().manual_seed(seed))


def first(found: Any) -> torch.Tensor:
    output: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return output


FAMILIES = [
    "qwen3.5",
    "qwen3-next",
    "olmo-hybrid",
    "kimi-linear",
    "lfm2",
    "bamba",
    "nemotron-h",
    "mamba2",
    "jamba",
    "mamba",
]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_rows_and_states_of_transformers(family: str, tmp_path: Path) -> None:
    """Prompts of several sequences, then single tokens of all of them, packed in a row in an order of their own; each
    sequence has two places, of which one is left as it is."""
    model, module = model_and_mixer(family, tmp_path)
    name = next(
        n
        for n in ("cache_params", "past_key_values", "cache")
        if n in inspect.signature(type(module).forward).parameters
    )
    caches = [DynamicCache(config=model.config) for _ in LENGTHS]
    store, mixer = Store(), Mixer(module, 0)
    layer = module.layer_idx
    for step in range(STEPS + 1):
        counts = LENGTHS if step == 0 else (1,) * len(LENGTHS)
        new = [drawn(count, 100 * step + number) for number, count in enumerate(counts)]
        order = [2, 0, 3, 1]
        spans, row = [], 0
        for number in order:
            source = NOTHING if step == 0 else 2 * number + (step - 1) % 2
            spans.append(StateSpan(row, counts[number], source, 2 * number + step % 2))
            row += counts[number]
        before = {key: value for key, value in store.held.items() if key[0] % 2 != step % 2}
        found = first(mixer.run(torch.cat([new[number] for number in order], dim=1), spans, store, (), {}))
        assert all(store.held[key] is value for key, value in before.items())
        for span, number in zip(spans, order, strict=True):
            expected = first(module(new[number], **{name: caches[number]}))
            rows = found[:, span.row : span.row + span.num_rows]
            torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-4)
            theirs = caches[number].layers[layer]
            for kind, states in ((CONV, theirs.conv_states), (RECURRENT, theirs.recurrent_states)):
                for index, state in states.items():
                    if state is not None:
                        kept = store.held[span.target, (kind, layer, index)]
                        torch.testing.assert_close(kept, state[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_prompt_in_chunks(family: str, tmp_path: Path) -> None:
    """The rows of the whole one, whether the class takes several tokens after a state or they come one by one."""
    _, module = model_and_mixer(family, tmp_path)
    rows, store, mixer = drawn(70, 0), Store(), Mixer(module, 0)
    assert mixer.goes_on == (family not in ("jamba", "mamba"))
    expected, found, begin = first(module(rows)), [], 0
    for index, count in enumerate((33, 1, 2, 34)):
        span = StateSpan(0, count, NOTHING if index == 0 else index % 2, (index + 1) % 2)
        found.append(first(mixer.run(rows[:, begin : begin + count], [span], store, (), {})))
        begin += count
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_a_prompt_longer_than_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexgen_lite.workers.compute.mixers.MOST_ROWS", 16)
    _, module = model_and_mixer("bamba", tmp_path)
    rows, mixer = drawn(70, 0), Mixer(module, 0)
    found = first(mixer.run(rows, [StateSpan(0, 70, NOTHING, 0)], Store(), (), {}))
    torch.testing.assert_close(found, first(module(rows)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3-moe"])
def test_other_layers_are_no_mixers(family: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model(family, tmp_path))
    assert not any(map(is_mixer, model.modules())) and not read_projections(model.modules())


READ = {
    "qwen3.5": set(),
    "lfm2": set(),
    "mamba2": {"out_proj"},
    "jamba": {"dt_proj"},
    "falcon-mamba": {"dt_proj", "x_proj", "out_proj"},
}


@pytest.mark.parametrize(("family", "names"), READ.items())
def test_projections_whose_weights_are_read_elsewhere(family: str, names: set[str], tmp_path: Path) -> None:
    model, _ = model_and_mixer(family, tmp_path)
    found = read_projections(model.modules())
    paths = {name.rpartition(".")[2] for name, module in model.named_modules() if module in found}
    assert paths == names and all(type(module) is nn.Linear for module in found)

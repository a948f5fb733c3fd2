"""Which linear layers lead to attention, and what is copied where when they are computed on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flexgen_lite.memory.projection_units import layers_with_projections, units_of
from flexgen_lite.wire.worker_messages import OpenModel, TokenBatch, TokenSpan
from flexgen_lite.workers.compute.device import CpuDevice, open_device
from flexgen_lite.workers.compute.host_projections import MOST_PROMPT_ROWS, HostProjections
from flexgen_lite.workers.compute.model_open import OpenedModel, open_model
from flexgen_lite.workers.model.weight_map import Binding
from tests.tiny_models import make_model


def opened(family: str, folder: Path, **changes: object) -> OpenedModel:
    model = make_model(family, folder / "model", **changes)
    return open_model(OpenModel(str(model), "auto", "float32", "cpu", False, None), open_device("cpu"), str(folder))


LLAMA_MODULES = ("q_proj", "k_proj", "v_proj")
LLAMA = ["k_proj.weight", "q_proj.weight", "v_proj.weight"]
EXPECTED = {
    "llama": LLAMA,
    "gemma3": LLAMA,
    "qwen3": LLAMA,
    "qwen3-moe": LLAMA,
    "diffllama-two-calls": LLAMA,
    "qwen2": sorted([*LLAMA, "k_proj.bias", "q_proj.bias", "v_proj.bias"]),
    "opt": sorted([*LLAMA, "k_proj.bias", "q_proj.bias", "v_proj.bias"]),
    "gpt2": ["c_attn.bias", "c_attn.weight"],
    "gpt-bigcode": ["c_attn.bias", "c_attn.weight"],
    "gpt-neox": ["query_key_value.bias", "query_key_value.weight"],
    "phi3": ["qkv_proj.weight"],
    "deepseek-v3": ["kv_a_proj_with_mqa.weight", "q_a_proj.weight", "q_b_proj.weight"],
    "longcat-two-calls": ["kv_a_proj_with_mqa.weight", "q_a_proj.weight", "q_b_proj.weight"] * 2,
}


@pytest.mark.parametrize("family", EXPECTED)
def test_the_linear_layers_that_lead_to_attention(family: str, tmp_path: Path) -> None:
    """In every layer; norms of queries and keys, what comes behind attention, and experts are not among them."""
    found = opened(family, tmp_path).spec
    for layer in range(found.num_layers):
        names = [found.units[layer].tensors[number].name for number in found.projections[layer]]
        assert sorted(".".join(name.split(".")[-2:]) for name in names) == sorted(EXPECTED[family])


def test_layers_without_attention_have_none(tmp_path: Path) -> None:
    found = opened("qwen3.5", tmp_path).spec
    assert layers_with_projections(found) == (1,), "of three layers, one attends"
    assert layers_with_projections(opened("mamba2", tmp_path / "other").spec) == ()


def test_layers_that_read_anothers_keys_have_queries_alone(tmp_path: Path) -> None:
    found = opened("gemma4-shared-kv", tmp_path).spec
    names = [[found.units[i].tensors[n].name.split(".")[-2] for n in found.projections[i]] for i in range(6)]
    assert sorted(names[0]) == ["k_proj", "q_proj", "v_proj"] and names[3:] == [["q_proj"]] * 3


class CountingDevice(CpuDevice):
    def __init__(self) -> None:
        self.fetched: list[int] = []  # rows

    def fetch(self, value: torch.Tensor) -> torch.Tensor:
        self.fetched.append(value.shape[-2])
        return super().fetch(value)


def batch(*lengths: int, prefill: bool = False) -> TokenBatch:
    spans = tuple(TokenSpan(0, length, 5, prefill, None, None) for length in lengths)
    return TokenBatch(0, 0, (), spans, (0,))


@pytest.fixture
def made(tmp_path: Path) -> tuple[OpenedModel, CountingDevice, HostProjections, list[torch.Tensor]]:
    """The projections of all layers but the first, each full of its layer's number."""
    model, device = opened("llama", tmp_path), CountingDevice()
    layers = (1, 2, 3)
    units = units_of(model.spec, layers)
    binding = Binding(model.model, model.layers, units)
    slots = [torch.full((units[4 + layer].num_bytes // 4,), float(layer)).view(torch.uint8) for layer in layers]
    projections = HostProjections(device, binding, units, layers, slots, model.projections, torch.float32)
    return model, device, projections, slots


def test_rows_are_copied_once_for_what_is_given_the_same(
    made: tuple[OpenedModel, CountingDevice, HostProjections, list[torch.Tensor]],
) -> None:
    model, device, projections, _ = made
    projections.begin([batch(1), batch(1)])
    q, k, v = (next(m for n, m in model.layers[2].named_modules() if n.endswith(name)) for name in LLAMA_MODULES)
    rows = torch.ones((1, 3, 64))
    for module in (q, k, v):
        assert torch.equal(module(rows), torch.full((1, 3, module.out_features), 128.0))
    assert device.fetched == [3]
    rows[0, 0] = 2  # the same tensor with another content
    assert float(q(rows)[0, 0, 0]) == 256.0
    q(torch.ones((1, 4, 64)))
    assert device.fetched == [3, 3, 4]
    projections.forget_rows()
    q(rows)
    assert device.fetched == [3, 3, 4, 3]


def test_weights_are_copied_in_passes_with_many_rows_of_prompts(
    made: tuple[OpenedModel, CountingDevice, HostProjections, list[torch.Tensor]],
) -> None:
    """Once in a pass, behind the layer's other weights; the next pass computes on the CPU again."""
    model, device, projections, slots = made
    units = units_of(model.spec, (1, 2, 3))
    rest = units[2].num_bytes
    slot = torch.zeros(rest + units[6].num_bytes, dtype=torch.uint8)
    q = model.layers[2].self_attn.q_proj
    assert isinstance(q, nn.Linear)
    few = [batch(*[1] * 200, MOST_PROMPT_ROWS // 2), batch(MOST_PROMPT_ROWS // 2, prefill=True)]
    projections.begin(few)
    assert projections.enter(2, slot) == 0 and not slot.any()
    projections.begin([*few, batch(1, prefill=True)])
    assert [projections.enter(2, slot) for _ in range(3)] == [units[6].num_bytes, 0, 0]
    assert torch.equal(slot[rest:], slots[1][: units[6].num_bytes]) and not slot[:rest].any()
    assert projections.enter(0, slot) == 0, "its projections are not apart"
    slot[rest:] = torch.full((units[6].num_bytes // 4,), 3.0).view(torch.uint8)
    rows = torch.ones((1, 3, 64))
    assert float(q(rows)[0, 0, 0]) == 3 * 64 and not device.fetched
    projections.begin([batch(1)])
    assert float(q(rows)[0, 0, 0]) == 2 * 64 and device.fetched == [3]

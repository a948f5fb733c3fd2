"""What stands between products is computed in one pass, and gives what Transformers' classes give."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN, GELUTanh
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated

from flexgen_lite.workers.compute import fused, prefill_cpu

CPU = torch.device("cpu")
HALF = torch.bfloat16

pytestmark = pytest.mark.skipif(prefill_cpu.parallel() is None, reason="PyTorch's threads are not GNU's")


@pytest.fixture(autouse=True)
def functions_as_they_were() -> Iterator[None]:
    """Rotary functions are replaced for a whole process."""
    names = [f"transformers.models.{kind}.modeling_{kind}" for kind in ("llama", "gemma3", "qwen3", "glm", "phi3")]
    modules = [importlib.import_module(name) for name in names]
    before = [module.apply_rotary_pos_emb for module in modules]
    before = [function._unfused if isinstance(function, fused._Rotary) else function for function in before]
    for module, function in zip(modules, before, strict=True):
        module.apply_rotary_pos_emb = function
    yield
    for module, function in zip(modules, before, strict=True):
        module.apply_rotary_pos_emb = function


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


def assert_alike(found: torch.Tensor, expected: torch.Tensor, share: float = 0.98) -> None:
    """The same bfloat16s, but for a few neighbours."""
    assert type(found) is torch.Tensor
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)
    assert (found == expected).float().mean() >= share


def with_weight(norm: nn.Module) -> nn.Module:
    norm.weight = nn.Parameter(1 + drawn(*norm.weight.shape, seed=9), requires_grad=False)  # type: ignore[operator]
    return norm


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm, GptOssRMSNorm, Qwen3NextRMSNorm])
@pytest.mark.parametrize("shape", [(1, 64), (1, 70, 64), (1, 3, 7, 128), (40, 2048)])
def test_norms_give_what_their_class_gives(kind: type[Any], shape: tuple[int, ...]) -> None:
    norm = with_weight(kind(shape[-1], eps=1e-5).to(HALF))
    rows = drawn(*shape) * torch.logspace(-3, 3, shape[-2])[:, None].to(HALF)
    expected = norm(rows)
    fused.fuse(norm, HALF, CPU)
    assert type(norm.forward).__name__ == "_Norm"
    assert_alike(norm(rows), expected)
    norm.weight.data = norm.weight.data * 2  # as another layer's may come into the same place
    assert_alike(norm(rows), 2 * expected if kind in (LlamaRMSNorm, GptOssRMSNorm) else type(norm).forward(norm, rows))


def test_a_norm_reads_rows_of_a_wider_matrix_and_keeps_what_is_no_number() -> None:
    norm = with_weight(LlamaRMSNorm(64).to(HALF))
    wide = drawn(1, 9, 3 * 64)
    wide[0, 4, 70] = torch.nan
    wide[0, 5, 70] = torch.inf
    rows = wide[..., 64:128]
    expected = norm(rows)
    fused.fuse(norm, HALF, CPU)
    torch.testing.assert_close(norm(rows), expected, rtol=2**-7, atol=0, equal_nan=True)
    assert norm(rows[:, :0]).shape == (1, 0, 64)


def test_a_rows_norm_depends_on_nothing_else() -> None:
    norm = with_weight(LlamaRMSNorm(256).to(HALF))
    fused.fuse(norm, HALF, CPU)
    rows = drawn(700, 256)
    together = norm(rows)
    assert all(torch.equal(together[i], norm(rows[i : i + 1])[0]) for i in range(0, 700, 37))


def test_gates_that_are_not_what_their_class_is_by_itself() -> None:
    """One that is told to compute otherwise, and one that changes what it is given."""
    model = nn.ModuleList([GELUTanh(use_gelu_tanh_python=True), nn.SiLU(inplace=True), GELUTanh(), nn.SiLU()])
    fused.fuse(model, HALF, CPU)
    assert [isinstance(module.forward, fused._Gate) for module in model] == [False, False, True, True]


@pytest.mark.parametrize("kind", [nn.SiLU, GELUTanh])
def test_infinity_before_a_gate(kind: type[nn.Module]) -> None:
    gate, rows, ones = kind(), torch.zeros(4, 64).to(HALF), torch.ones(4, 64).to(HALF)
    rows[1, 3], rows[2, 5], rows[3, 7], rows[0, 0] = float("-inf"), float("inf"), float("nan"), -0.0
    expected = gate(rows) * ones
    model = nn.ModuleList([gate])
    fused.fuse(model, HALF, CPU)
    found = gate(rows) * ones
    assert torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.isposinf(), expected.isposinf())
    assert torch.equal(found.signbit()[0], expected.signbit()[0])


def test_an_input_that_changes_before_the_output_is_used() -> None:
    gate, rows = nn.SiLU(), drawn(4, 64)
    fused.fuse(nn.ModuleList([gate]), HALF, CPU)
    waiting = gate(rows)
    rows.zero_()
    with pytest.raises(RuntimeError, match="was changed before"):
        waiting * drawn(4, 64)


@pytest.mark.parametrize("norm", [CohereLayerNorm(64), nn.LayerNorm(64), LlamaRMSNorm(36), Qwen3NextRMSNormGated(64)])
def test_other_norms_stay_as_they_are(norm: nn.Module) -> None:
    fused.fuse(norm.to(HALF), HALF, CPU)
    assert "forward" not in vars(norm)


def test_other_dtypes_stay_as_they_are() -> None:
    norm = LlamaRMSNorm(64)
    fused.fuse(norm, torch.float32, CPU)
    assert "forward" not in vars(norm)
    fused.fuse(norm.to(HALF), HALF, CPU)
    norm.to(torch.float32)
    rows = drawn(5, 64).float()
    torch.testing.assert_close(norm(rows), LlamaRMSNorm.forward(norm, rows), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("rows", [1, 50, 3000])
def test_gates_give_what_the_activation_and_a_product_give(name: str, rows: int) -> None:
    activation, plain = ACT2FN[name], ACT2FN[name]
    fused.fuse(activation, HALF, CPU)
    gate_up = 6 * drawn(1, rows, 2 * 96)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = plain(gate) * up
    assert_alike(activation(gate) * up, expected)
    assert_alike(up * activation(gate), expected)
    assert_alike(torch.mul(activation(gate.contiguous()), up), expected)


def test_a_gates_row_depends_on_nothing_else() -> None:
    activation = ACT2FN["silu"]
    fused.fuse(activation, HALF, CPU)
    gate, up = drawn(3000, 96), drawn(3000, 96, seed=1)
    together = activation(gate) * up
    assert all(torch.equal(together[i], (activation(gate[i]) * up[i])) for i in range(0, 3000, 171))


def test_gates_keep_what_is_no_number_or_very_large() -> None:
    activation, plain = ACT2FN["silu"], ACT2FN["silu"]
    fused.fuse(activation, HALF, CPU)
    gate = torch.tensor([torch.nan, torch.inf, 3e38, -3e38, 100.0, -100.0, 0.0, -0.0] * 4, dtype=HALF)
    up = torch.ones_like(gate)
    torch.testing.assert_close(activation(gate) * up, plain(gate) * up, rtol=2**-7, atol=1e-30, equal_nan=True)


def test_an_activation_that_is_not_multiplied_is_itself() -> None:
    activation, plain = ACT2FN["silu"], ACT2FN["silu"]
    fused.fuse(activation, HALF, CPU)
    rows, linear = drawn(5, 64), nn.Linear(64, 32, dtype=HALF)
    expected = plain(rows)
    waiting = activation(rows)
    for found in (waiting + 0, waiting.clone(), torch.cat([waiting]), waiting.view(5, 64), waiting.contiguous()):
        assert_alike(found, expected, share=1)
    assert_alike(linear(waiting), linear(expected), share=1)
    assert (waiting.shape, waiting.dtype, len(waiting)) == (rows.shape, HALF, 5)
    assert_alike(waiting * 2, expected * 2, share=1)
    assert_alike(waiting * expected[:, :1], expected * expected[:, :1], share=1)  # broadcast
    assert_alike(waiting * activation(rows), expected * expected, share=1)
    target = torch.empty_like(rows)
    target.copy_(waiting)
    assert_alike(target, expected, share=1)
    with torch.inference_mode():
        assert_alike(activation(rows) * rows, expected * rows)


@pytest.mark.parametrize("name", ["gelu", "relu", "gelu_new", "quick_gelu"])
def test_other_activations_stay_as_they_are(name: str) -> None:
    activation = ACT2FN[name]
    fused.fuse(activation, HALF, CPU)
    assert "forward" not in vars(activation)


@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("tokens", [1, 90])
def test_rotary_positions_give_the_same_bits(by_token: bool, tokens: int) -> None:
    original = modeling_llama.apply_rotary_pos_emb

    def heads(count: int) -> torch.Tensor:
        return drawn(1, tokens, count, 64).transpose(1, 2) if by_token else drawn(1, count, tokens, 64)

    query, key, cos, sin = heads(12), heads(3), drawn(1, tokens, 64, seed=1), drawn(1, tokens, 64, seed=2)
    model = small("llama")
    fused.fuse(model, HALF, CPU)
    assert modeling_llama.apply_rotary_pos_emb is not original
    found = modeling_llama.apply_rotary_pos_emb(query, key, cos, sin)
    for ours, theirs in zip(found, original(query, key, cos, sin), strict=True):
        assert torch.equal(ours, theirs)
        assert tokens == 1 or ours.stride() == theirs.stride()
    in_float32 = [x.float() for x in (query, key, cos, sin)]
    for ours, theirs in zip(modeling_llama.apply_rotary_pos_emb(*in_float32), original(*in_float32), strict=True):
        assert torch.equal(ours, theirs)


def small(kind: str) -> nn.Module:
    sizes = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "pad_token_id": 0, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=HALF).eval()
    for name, weight in model.named_parameters():
        weight.data = weight.data * 3 if weight.dim() > 1 else weight.data + drawn(*weight.shape) / 4
        assert "norm" not in name or weight.dim() == 1
    return model


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3", "phi3", "glm", "olmo2"])
def test_whole_models_give_the_same_logits(kind: str) -> None:
    """But for roundings: what is fused and what stays meet each other's layouts."""
    model = small(kind)
    ids = torch.arange(50)[None] % 96
    with torch.inference_mode():
        expected = model(ids).logits.float()
        float32 = small(kind).float()(ids).logits
        fused.fuse(model, HALF, CPU)
        found = model(ids).logits.float()
    assert sum(type(module.forward).__name__ == "_Norm" for module in model.modules()) >= 5
    error, of_half = (found - float32).square().mean(), (expected - float32).square().mean()
    assert error <= 1.3 * of_half

"""The kernel for products of few rows: exact but for rounding, and nothing written beside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from flexgen_lite.workers.compute import product_kernels, products
from flexgen_lite.workers.compute.product_kernels import MAX_ROWS, PackedWeight, packed_weight
from flexgen_lite.workers.compute.products import Products

pytestmark = pytest.mark.skipif(
    not products._works(torch.bfloat16) or not product_kernels.is_available(), reason="not on this processor"
)

SHAPES = [(64, 64), (128, 96), (200, 64), (96, 2048), (1, 32), (79, 5632), (50272, 64)]  # N, K
ROWS = (1, 2, 5, 7, 8, 15, 16, 17, 31, 33, 64)
GUARD = 77.0


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def pack(weight_NK: torch.Tensor, offset: int = 0) -> tuple[PackedWeight, torch.Tensor]:
    """`weight_NK` in the order that the kernel wants, `offset` items into the memory that comes with it."""
    columns, width = weight_NK.shape
    blocks = torch.zeros(-(-columns // 64) * 64, width, dtype=weight_NK.dtype)
    blocks[:columns] = weight_NK
    memory = torch.empty(offset + blocks.numel(), dtype=weight_NK.dtype)
    memory[offset:] = blocks.view(-1, 64, width // 2, 2).transpose(1, 2).reshape(-1)
    weight = packed_weight(memory.data_ptr() + 2 * offset, 2 * blocks.numel(), weight_NK.shape)
    assert weight is not None
    return weight, memory


def check(weight: PackedWeight, weight_NK: torch.Tensor, x_TK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
    rows, columns = x_TK.shape[0], weight_NK.shape[0]
    guarded = torch.full((rows + 2, columns), GUARD, dtype=torch.bfloat16)
    assert weight.serves(x_TK, bias_N)
    weight.multiply_into(guarded[1:-1], x_TK, bias_N)
    expected = x_TK.double() @ weight_NK.double().t()
    magnitude = x_TK.double().abs() @ weight_NK.double().abs().t()
    if bias_N is not None:
        expected, magnitude = expected + bias_N.double(), magnitude + bias_N.double().abs()
    error = (guarded[1:-1].double() - expected).abs()
    assert bool((error <= expected.abs() * 2**-8 + magnitude * 2**-20).all())
    assert bool((guarded[0] == GUARD).all() and (guarded[-1] == GUARD).all())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int], with_bias: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    columns, width = shape
    weight_NK = torch.randn(shape).bfloat16()
    bias_N = torch.randn(columns).bfloat16() if with_bias else None
    weight, _memory = pack(weight_NK)
    for rows in ROWS if columns < 1000 else (1, 16, 33):
        check(weight, weight_NK, torch.randn(rows, width).bfloat16(), bias_N)


def test_a_weight_at_any_address() -> None:
    weight_NK = torch.randn(130, 96).bfloat16()
    weight, _memory = pack(weight_NK, offset=3)
    check(weight, weight_NK, torch.randn(9, 96).bfloat16(), None)


@pytest.mark.parametrize("shape", SHAPES)
def test_onednn_keeps_weights_in_that_order(shape: tuple[int, int]) -> None:
    weight_NK = torch.randn(shape).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK)
    address, num_bytes = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    weight = packed_weight(address, num_bytes, weight_NK.shape)
    if weight is not None:  # else oneDNN computes the product
        check(weight, weight_NK, torch.randn(3, shape[1]).bfloat16(), None)


def test_a_row_does_not_depend_on_others() -> None:
    weight, _memory = pack(torch.randn(128, 2048).bfloat16())
    x_TK = torch.randn(MAX_ROWS, 2048).bfloat16()
    alone = torch.cat([weight.multiply(x_TK[i : i + 1], None) for i in range(MAX_ROWS)])
    for rows in (2, 7, 16, MAX_ROWS):
        assert torch.equal(weight.multiply(x_TK[:rows], None), alone[:rows])


def test_infinities_and_nans_stay_in_their_place() -> None:
    weight_NK = torch.randn(64, 64).bfloat16()
    x_TK = torch.randn(8, 64).bfloat16()
    x_TK[3, 5], x_TK[6, 7] = float("inf"), float("nan")
    weight, _memory = pack(weight_NK)
    output = weight.multiply(x_TK, None)
    assert bool(output[3].isinf().all() and output[6].isnan().all())
    assert bool(output[[0, 1, 2, 4, 5, 7]].isfinite().all())


def test_what_is_not_served() -> None:
    weight, _memory = pack(torch.randn(64, 64).bfloat16())
    x_TK = torch.randn(4, 64).bfloat16()
    bias_N = torch.zeros(64, dtype=torch.bfloat16)
    assert weight.serves(x_TK, bias_N) and weight.serves(x_TK.view(2, 2, 64), None)
    assert not weight.serves(x_TK.float(), None) and not weight.serves(x_TK, bias_N.float())
    assert not weight.serves(x_TK[:, :32], None) and not weight.serves(x_TK.new_zeros(MAX_ROWS + 1, 64), None)
    assert not weight.serves(x_TK.new_zeros(64, 4).t(), None)
    assert packed_weight(64, 64 * 65 * 2, torch.Size((64, 65))) is None
    assert packed_weight(64, 64 * 64 * 2 + 64, torch.Size((64, 64))) is None


@pytest.mark.parametrize("shape", [(5, 256), (1, 1, 256), (2, 3, 256), (70, 256)])
@pytest.mark.parametrize("copied", [False, True])
def test_a_linear_layer(shape: tuple[int, ...], copied: bool) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(128, 256), "head": nn.Linear(256, 128)}).bfloat16()
    if copied:
        model["head"].weight = model["embedding"].weight
    model.requires_grad_(False)
    x = torch.randn(shape).bfloat16()
    expected = model["head"](x)
    Products(model, torch.bfloat16, torch.device("cpu")).pack([model["head"]], copy_shared=True)
    assert model["head"].forward._few_rows is not None
    output = model["head"](x)
    assert output.shape == expected.shape and torch.allclose(output.float(), expected.float(), rtol=1e-2, atol=1e-3)

"""Our own kernels for products: exact but for rounding, and nothing written beside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from flexgen_lite.workers.compute import product_amx, product_weights, products
from flexgen_lite.workers.compute.product_panels import PACKED, ROWS, TRANSPOSED
from flexgen_lite.workers.compute.product_weights import Weights, segments, weight_of_onednn, weights_in_rows
from flexgen_lite.workers.compute.products import Products

pytestmark = pytest.mark.skipif(
    not products._works(torch.bfloat16) or not product_weights.serves_width(32), reason="not on this processor"
)

SHAPES = [(64, 64), (128, 96), (200, 64), (96, 2048), (1, 32), (79, 5632), (50272, 64)]  # N, K
ROWS_OF_X = (1, 2, 5, 7, 8, 15, 16, 17, 31, 33, 64, 65, 100)
GUARD = 77.0
TILES = (False, True) if product_amx.allowed() else (False,)


@pytest.fixture(autouse=True)
def _same_threads_after() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=TILES, ids=["tiles" if tiles else "vectors" for tiles in TILES])
def _both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_amx, "allowed", lambda: request.param)


def pack(weight_NK: torch.Tensor, offset: int = 0) -> tuple[Weights, torch.Tensor]:
    """`weight_NK` in panels, `offset` items into the memory that comes with it."""
    columns, width = weight_NK.shape
    blocks = torch.zeros(-(-columns // 64) * 64, width, dtype=weight_NK.dtype)
    blocks[:columns] = weight_NK
    memory = torch.empty(offset + blocks.numel(), dtype=weight_NK.dtype)
    memory[offset:] = blocks.view(-1, 64, width // 2, 2).transpose(1, 2).reshape(-1)
    return Weights(memory.data_ptr() + 2 * offset, PACKED, columns, width), memory


def stored(weight_NK: torch.Tensor, storage: int) -> tuple[Weights, torch.Tensor]:
    if storage == PACKED:
        return pack(weight_NK)
    memory = weight_NK.t().contiguous() if storage == TRANSPOSED else weight_NK
    weight = weights_in_rows(memory, storage == TRANSPOSED)
    assert weight is not None and weight.storage == storage
    return weight, memory


def is_product(output: torch.Tensor, weight_NK: torch.Tensor, x_TK: torch.Tensor, bias_N: torch.Tensor | None) -> bool:
    """Whether `output` is exact but for the sum's order and one rounding."""
    expected = x_TK.double() @ weight_NK.double().t()
    magnitude = x_TK.double().abs() @ weight_NK.double().abs().t()
    if bias_N is not None:
        expected, magnitude = expected + bias_N.double(), magnitude + bias_N.double().abs()
    error = (output.double() - expected).abs()
    return bool((error <= expected.abs() * 2**-8 + magnitude * 2**-20).all())


def check(weight: Weights, weight_NK: torch.Tensor, x_TK: torch.Tensor, bias_N: torch.Tensor | None) -> None:
    rows, columns = x_TK.shape[0], weight_NK.shape[0]
    guarded = torch.full((rows + 2, columns), GUARD, dtype=torch.bfloat16)
    bias = None if bias_N is None else bias_N[None]
    weight.multiply_segments(guarded[1:-1], x_TK, bias, segments([(0, rows)], weight.most_rows))
    assert is_product(guarded[1:-1], weight_NK, x_TK, bias_N)
    assert bool((guarded[0] == GUARD).all() and (guarded[-1] == GUARD).all())


@pytest.mark.usefixtures("_both")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("storage", [PACKED, ROWS, TRANSPOSED])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int], storage: int, with_bias: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    columns, width = shape
    weight_NK = torch.randn(shape).bfloat16()
    bias_N = torch.randn(columns).bfloat16() if with_bias else None
    weight, _memory = stored(weight_NK, storage)
    for rows in ROWS_OF_X if columns < 1000 else (1, 16, 33):
        check(weight, weight_NK, torch.randn(rows, width).bfloat16(), bias_N)


@pytest.mark.usefixtures("_both")
def test_more_rows_than_a_segment_has() -> None:
    weight_NK = torch.randn(128, 64).bfloat16()
    weight, _memory = pack(weight_NK)
    check(weight, weight_NK, torch.randn(2 * weight.most_rows + 7, 64).bfloat16(), torch.randn(128).bfloat16())


@pytest.mark.usefixtures("_both")
def test_a_weight_at_any_address() -> None:
    weight_NK = torch.randn(130, 96).bfloat16()
    weight, _memory = pack(weight_NK, offset=3)
    check(weight, weight_NK, torch.randn(9, 96).bfloat16(), None)


@pytest.mark.usefixtures("_both")
@pytest.mark.parametrize("storage", [PACKED, ROWS, TRANSPOSED])
def test_many_weights_and_rows_in_any_order(storage: int) -> None:
    torch.manual_seed(0)
    weights_ENK, bias_EN = torch.randn(5, 128, 64).bfloat16(), torch.randn(5, 128).bfloat16()
    memory = weights_ENK.transpose(1, 2).contiguous() if storage == TRANSPOSED else weights_ENK.clone()
    weights = weights_in_rows(memory, storage == TRANSPOSED)
    assert weights is not None
    weights = weights.pack() if storage == PACKED else weights
    rows = [(1, 3), (2, 70), (4, 17)]
    x_TK, numbers = torch.randn(200, 64).bfloat16(), torch.randint(200, (90,))
    to = torch.randperm(100)[:90]
    output = torch.full((100, 128), GUARD, dtype=torch.bfloat16)
    weights.multiply_segments(output, x_TK, bias_EN, segments(rows, weights.most_rows), numbers, to)
    begin = 0
    for expert, count in rows:
        part = slice(begin, begin + count)
        assert is_product(output[to[part]], weights_ENK[expert], x_TK[numbers[part]], bias_EN[expert])
        begin += count
    others = [i for i in range(100) if i not in set(to.tolist())]
    assert bool((output[others] == GUARD).all())


def test_packing_in_place() -> None:
    weight_NK = torch.randn(192, 96).bfloat16()
    _, memory = pack(weight_NK)
    rows = weights_in_rows(weight_NK)
    assert rows is not None and rows.pack().storage == PACKED
    assert torch.equal(weight_NK.view(-1), memory)


@pytest.mark.parametrize("shape", SHAPES)
def test_onednn_keeps_weights_in_that_order(shape: tuple[int, int]) -> None:
    weight_NK = torch.randn(shape).bfloat16()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_NK)
    address, num_bytes = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    weight = weight_of_onednn(address, num_bytes, weight_NK.shape)
    if weight is not None:  # else oneDNN computes the product
        check(weight, weight_NK, torch.randn(3, shape[1]).bfloat16(), None)


@pytest.mark.usefixtures("_both")
def test_a_row_does_not_depend_on_others() -> None:
    weight, _memory = pack(torch.randn(128, 2048).bfloat16())
    x_TK = torch.randn(150, 2048).bfloat16()
    alone = torch.cat([weight.multiply(x_TK[i : i + 1], None) for i in range(len(x_TK))])
    for rows in (2, 7, 16, 64, 150):
        assert torch.equal(weight.multiply(x_TK[:rows], None), alone[:rows])


@pytest.mark.usefixtures("_both")
def test_infinities_and_nans_stay_in_their_place() -> None:
    weight_NK = torch.randn(64, 64).bfloat16()
    x_TK = torch.randn(8, 64).bfloat16()
    x_TK[3, 5], x_TK[6, 7] = float("inf"), float("nan")
    weight, _memory = pack(weight_NK)
    output = weight.multiply(x_TK, None)
    assert bool(output[3].isinf().all() and output[6].isnan().all())
    assert bool(output[[0, 1, 2, 4, 5, 7]].isfinite().all())


def test_what_is_not_served() -> None:
    weight_NK = torch.randn(64, 64).bfloat16()
    assert weights_in_rows(weight_NK) is not None and weights_in_rows(weight_NK, is_transposed=True) is not None
    assert weights_in_rows(weight_NK.float()) is None and weights_in_rows(weight_NK.t()) is None
    assert weights_in_rows(weight_NK[:, :48].contiguous()) is None
    assert weight_of_onednn(64, 64 * 65 * 2, torch.Size((64, 65))) is None
    assert weight_of_onednn(64, 64 * 64 * 2 + 64, torch.Size((64, 64))) is None


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
    assert model["head"].forward._ours is not None
    output = model["head"](x)
    assert output.shape == expected.shape and torch.allclose(output.float(), expected.float(), rtol=1e-2, atol=1e-3)

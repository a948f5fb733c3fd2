"""Products with weights of 8 and 4 bits: those of the weights that the bits stand for, rounded to bfloat16 once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from flexgen_lite.model.packing import TABLES, Packing
from flexgen_lite.workers import simd
from flexgen_lite.workers.compute import product_amx, unpacked_weights
from flexgen_lite.workers.compute.product_weights import segments, serves_width, weights_of_bits
from flexgen_lite.workers.compute.unpacked_weights import PackedBits, multiplied, rounded, unpacked
from flexgen_lite.workers.model.weight_map import packed_weights
from tests.packed_weights import packed

SHAPES = [(64, 64, 32), (200, 256, 128), (79, 1408, 64), (64, 2048, 2048), (130, 2880, 32), (64, 96, 48), (70, 160, 16)]
FEW_SHAPES = SHAPES[1:3]  # where the finish is not the usual one
TILES = (False, True) if product_amx.allowed() else (False,)
ROWS = (1, 15, 16, 17, 70)


FORMS = [
    *(("int", bits, zeros, "") for bits in (8, 4) for zeros in ("", "uint8", "float32")),
    *((kind, 4, zeros, "") for kind in ("uint", "e2m1", "nf4", "fp4") for zeros in ("", "float32")),
    ("e4m3", 8, "", ""),
    *(("int", bits, zeros, "float16") for bits in (8, 4) for zeros in ("", "uint8")),
    ("nf4", 4, "", "float16"),
    ("e4m3", 8, "", "float16"),
    ("int", 8, "", "127"),
]
"""Kind, bits, zeros or offsets, finish."""
WHOLE = [form for form in FORMS if form[0] == "int" and form[2] != "float32" and not form[3]]


def made(shape: tuple[int, int, int], group: int, packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed bytes and the weights that they stand for, `[E, N, K]` in float32, rounded once."""
    generator = torch.Generator().manual_seed(packing.bits + group)
    count, columns, width = shape
    most = 1 << (packing.bits - 1)
    codes_ENK = torch.randint(-most, most, shape, generator=generator)
    scales = (count, columns, width // group)
    scale_ENG = torch.rand(scales, generator=generator) * 0.01 + 0.001
    scale_ENG = scale_ENG.to(getattr(torch, packing.scale_dtype)).float()
    zero_ENG = None
    if packing.kind == "int":
        values = codes_ENK.double()
    else:
        codes_ENK += most
        if packing.kind == "e4m3":
            codes_ENK[0, 0, :256] = torch.arange(width)[:256]  # all there are
            values = codes_ENK.to(torch.uint8).view(torch.float8_e4m3fn).double()
        else:
            values = torch.tensor(TABLES[packing.kind]).double()[codes_ENK]
    if packing.zeros == "uint8":
        zero_ENG = torch.randint(-most, most, scales, generator=generator)
        values = values - zero_ENG.repeat_interleave(group, 2)
    weights = values * scale_ENG.double().repeat_interleave(group, 2)
    if packing.zeros == "float32":
        zero_ENG = torch.randn(scales, generator=generator)
        weights = weights.float().double() + zero_ENG.double().repeat_interleave(group, 2)
    if packing.finish == "127":
        weights = weights.float().double() * torch.tensor(1 / 127, dtype=torch.float32).double()
    elif packing.finish == "float16":
        weights = weights.float().half()
    memory = packed(codes_ENK, scale_ENG, zero_ENG, packing)
    assert memory.numel() == packing.num_bytes(shape)
    return memory, weights.float()


def orders(finish: str) -> tuple[str, ...]:
    return ("bfloat16", "int8") if finish != "127" else ("bfloat16",)


@pytest.mark.parametrize(("kind", "bits", "zeros", "finish"), FORMS)
def test_unpacking(kind: str, bits: int, zeros: str, finish: str) -> None:
    for columns, width, group in FEW_SHAPES if finish else SHAPES:
        for scale_dtype in ("bfloat16", "float16", "float32"):
            for order in orders(finish):
                packing = Packing(bits, group, order, scale_dtype, zeros, kind=kind, finish=finish)
                shape = (3, columns, width)
                memory, weights_ENK = made(shape, group, packing)
                for index in (0, 2):
                    found = unpacked(memory, packing, shape, index, torch.float32)
                    assert torch.equal(found.nan_to_num(7), weights_ENK[index].nan_to_num(7))
                    half = unpacked(memory, packing, shape, index, torch.bfloat16)
                    assert torch.equal(half.nan_to_num(7), weights_ENK[index].bfloat16().nan_to_num(7))


@pytest.mark.skipif(not serves_width(32), reason="not on this processor")
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(("kind", "bits", "zeros", "finish"), FORMS)
def test_against_float64(
    kind: str, bits: int, zeros: str, finish: str, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_amx, "allowed", lambda: tiles)
    for columns, width, group in FEW_SHAPES if finish else SHAPES:
        for scale_dtype, count in (("bfloat16", 1), ("float32", 3), ("float16", 1)):
            packing = Packing(bits, group, "bfloat16", scale_dtype, zeros, kind=kind, finish=finish)
            shape = (count, columns, width)
            memory, weights_ENK = made(shape, group, packing)
            weights = weights_of_bits(memory, packing, shape)
            assert weights is not None
            for rows in ROWS:
                x_TK = torch.randn(rows * count, width).bfloat16()
                output = torch.empty(rows * count, columns).bfloat16()
                parts = segments([(index, rows) for index in range(count)], weights.most_rows)
                weights.multiply_segments(output, x_TK, None, parts)
                for index in range(count):
                    part = slice(index * rows, (index + 1) * rows)
                    weight_NK = weights_ENK[index].bfloat16().double()
                    is_number = ~weight_NK.isnan().any(1)
                    assert bool(output[part][:, ~is_number].isnan().all())
                    weight_NK = weight_NK[is_number]
                    expected = x_TK[part].double() @ weight_NK.t()
                    magnitude = x_TK[part].double().abs() @ weight_NK.abs().t()
                    error = (output[part][:, is_number].double() - expected).abs()
                    assert bool((error <= expected.abs() * 2**-8 + magnitude * 2**-20).all())


@pytest.mark.skipif(not serves_width(32), reason="not on this processor")
def test_a_row_does_not_depend_on_others() -> None:
    packing = Packing(4, 32, "bfloat16", "bfloat16", "uint8")
    memory, _ = made((1, 128, 2048), 32, packing)
    weight = weights_of_bits(memory, packing, (1, 128, 2048))
    assert weight is not None
    x_TK = torch.randn(70, 2048).bfloat16()
    alone = torch.cat([weight.multiply(x_TK[i : i + 1], None) for i in range(len(x_TK))])
    for rows in (2, 16, 17, 70):
        assert torch.equal(weight.multiply(x_TK[:rows], None), alone[:rows])


@pytest.mark.parametrize("rounds_rows", [False, True])
def test_a_row_does_not_depend_on_others_where_no_kernel_serves(rounds_rows: bool) -> None:
    packing = Packing(4, 32, "int8", "bfloat16", "uint8", rounds_rows=rounds_rows)
    memory, _ = made((1, 1024, 2048), 32, packing)
    module = nn.Module()
    packed_weights(module)["weight"] = memory
    bits = PackedBits(module, "weight", packing, (1, 1024, 2048), torch.float32)
    x_TK = torch.randn(600, 2048)
    alone = multiplied(linear, x_TK[:1], bits, 0, None)
    for rows in (2, 8, 129, 300, 600):
        assert torch.equal(multiplied(linear, x_TK[:rows], bits, 0, None)[:1], alone)


@pytest.mark.skipif(not serves_width(32) or not simd.BYTES, reason="not on this processor")
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_in_whole_numbers(bits: int, has_zeros: bool) -> None:
    """Exact but for sums of float32, of rows that are rounded group by group."""
    for columns, width, group in SHAPES:
        for scale_dtype, count in (("bfloat16", 1), ("float32", 3)):
            packing = Packing(bits, group, "int8", scale_dtype, "uint8" if has_zeros else "", rounds_rows=True)
            shape = (count, columns, width)
            memory, weights_ENK = made(shape, group, packing)
            weights = weights_of_bits(memory, packing, shape)
            assert weights is not None
            for rows in (1, 5, 6, 7, 16, 70):
                x_TK = torch.randn(rows * count, width).bfloat16()
                x_TK[0, :group] = 0
                output = torch.empty(rows * count, columns).bfloat16()
                parts = segments([(index, rows) for index in range(count)], weights.most_rows)
                weights.multiply_segments(output, x_TK, None, parts)
                for index in range(count):
                    part = slice(index * rows, (index + 1) * rows)
                    near_TK = rounded(x_TK[part].float(), group).double()
                    expected = near_TK @ weights_ENK[index].double().t()
                    magnitude = near_TK.abs() @ weights_ENK[index].double().abs().t()
                    error = (output[part].double() - expected).abs()
                    assert bool((error <= expected.abs() * 2**-8 + magnitude * 2**-19).all())


@pytest.mark.skipif(not serves_width(32) or not simd.BYTES, reason="not on this processor")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_shows_in_its_row_alone(value: float) -> None:
    packing = Packing(4, 32, "int8", "bfloat16", "uint8", rounds_rows=True)
    memory, _ = made((1, 64, 64), 32, packing)
    weight = weights_of_bits(memory, packing, (1, 64, 64))
    assert weight is not None
    x_TK = torch.randn(8, 64).bfloat16()
    x_TK[3, 5] = value
    output = weight.multiply(x_TK, None)
    assert bool(output[3].isnan().all() and output[[0, 1, 2, 4, 5, 6, 7]].isfinite().all())


def test_rounding_of_rows() -> None:
    x_TK = torch.tensor([[0.0] * 16 + [127.0, -63.4] + [0.5] * 14])
    assert torch.equal(rounded(x_TK, 16)[0, :18], torch.tensor([0.0] * 16 + [127.0, -63.0]))
    assert rounded(x_TK, 16)[0, 18:].tolist() == [0.0] * 14  # ties to even
    tiny = torch.tensor([[3e-37] + [0.0] * 15])
    assert torch.allclose(rounded(tiny, 16), tiny, rtol=0.5, atol=0)


@pytest.mark.parametrize("rounds_rows", [False, True])
@pytest.mark.parametrize(("kind", "bits", "zeros", "finish"), FORMS)
def test_where_no_kernel_serves(
    kind: str, bits: int, zeros: str, finish: str, rounds_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacked_weights, "SLAB_ITEMS", {"cpu": 16 * 1024})  # some of the shapes in several slabs
    dtypes = ("bfloat16", "float16", "float32")
    forms = [(*shape, dtypes[i % 3]) for i, shape in enumerate(FEW_SHAPES if finish else SHAPES)]
    for columns, width, group, scale_dtype in forms:
        for order in orders(finish):
            packing = Packing(bits, group, order, scale_dtype, zeros, rounds_rows=rounds_rows, kind=kind, finish=finish)
            memory, weights_ENK = made((2, columns, width), group, packing)
            module = nn.Module()
            packed_weights(module)["weight"] = memory
            weight = PackedBits(module, "weight", packing, (2, columns, width), torch.float32)
            assert weight.ours() is None
            x_TK, bias_N = torch.randn(5, width), torch.randn(columns)
            rows_TK = rounded(x_TK, group) if rounds_rows else x_TK
            expected = rows_TK.double() @ weights_ENK[1].double().t() + bias_N
            magnitude = rows_TK.double().abs() @ weights_ENK[1].double().abs().t() + 1
            found = multiplied(linear, x_TK, weight, 1, bias_N).double()
            assert torch.equal(found.isnan(), expected.isnan())
            assert bool((((found - expected).abs() <= magnitude * 2**-18) | expected.isnan()).all())

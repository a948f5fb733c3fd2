"""Scales of one byte: alone, with factors in common, and offsets that have such factors, too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from flexgen_lite.model.packing import TABLES, Packing
from flexgen_lite.workers import simd
from flexgen_lite.workers.compute.product_weights import segments, serves_width, weights_of_bits
from flexgen_lite.workers.compute.unpacked_weights import PackedBits, multiplied, rounded, unpacked
from flexgen_lite.workers.model.weight_map import packed_weights
from tests.packed_weights import packed

SHAPES = [(200, 256), (70, 1024)]
POWERS, E4M3 = "float8_e8m0fnu", "float8_e4m3fn"
FORMS = {
    "MXFP4": Packing(4, 32, "bfloat16", POWERS, kind="e2m1"),
    "MXFP8": Packing(8, 32, "bfloat16", POWERS, kind="e4m3"),
    "NVFP4, divided": Packing(4, 16, "bfloat16", E4M3, kind="e2m1", factors="float32", factor_group=0, divides=True),
    "NVFP4": Packing(4, 16, "bfloat16", E4M3, kind="e2m1", factors="float32", factor_group=0),
    "Q4_K": Packing(4, 32, "bfloat16", "uint8", "scaled", kind="uint", factors="float16", factor_group=256),
    "Q5_K": Packing(8, 32, "bfloat16", "uint8", "scaled", factors="float16", factor_group=256),
    "Q6_K": Packing(8, 16, "bfloat16", "int8", factors="float16", factor_group=256),
    "small": Packing(4, 16, "bfloat16", "int8", factors="float32", factor_group=64),
}
WHOLE = ("Q6_K", "small")


def with_width(packing: Packing, width: int, **changes: object) -> Packing:
    """Factors for whole columns where `packing` does not say for how many items."""
    group = (packing.factor_group or width) if packing.factors else 0
    return replace(packing, factor_group=group, **changes)  # type: ignore[arg-type]


def made(shape: tuple[int, int, int], packing: Packing) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed bytes and the weights that they stand for, `[E, N, K]`, as float32 has them: each product rounded."""
    generator = torch.Generator().manual_seed(len(packing.kind) + packing.group)
    count, columns, width = shape
    most = 1 << (packing.bits - 1)
    groups = (count, columns, width // packing.group)
    codes_ENK = torch.randint(0, 2 * most, shape, generator=generator)
    if packing.kind == "int":
        codes_ENK -= most
        values = codes_ENK.float()
    elif packing.kind == "e4m3":
        codes_ENK &= 0xF7
        values = codes_ENK.to(torch.uint8).view(torch.float8_e4m3fn).float()
    else:
        values = torch.tensor(TABLES[packing.kind])[codes_ENK]
    if packing.scale_dtype == POWERS:
        scale_ENG = torch.randint(-126, 20, groups, generator=generator).float().exp2()
        scale_ENG[0, 0, 0] = 2.0**-127  # the smallest there is
    elif packing.scale_dtype == E4M3:
        scale_ENG = (torch.rand(groups, generator=generator) * 400).to(torch.float8_e4m3fn).float()
    else:
        low, high = (-128, 128) if packing.scale_dtype == "int8" else (0, 64)
        scale_ENG = torch.randint(low, high, groups, generator=generator).float()
    each, factors, zero_ENG, offsets = packing.group, (), None, None
    stored = scale_ENG.clone()
    if packing.factors:
        shape_of_factors = (count, columns, width // packing.factor_group)
        repeat = packing.factor_group // each
        factors = tuple(
            (torch.rand(shape_of_factors, generator=generator) + 0.3).mul(0.01).half().float()
            for _ in range(2 if packing.zeros else 1)
        )
        if packing.factors == "float32":
            factors = tuple(factor * 1.2345678 for factor in factors)
        factor = factors[0].repeat_interleave(repeat, 2)
        scale_ENG = scale_ENG / factor if packing.divides else scale_ENG * factor
        if packing.zeros:
            zero_ENG = torch.randint(0, 64, groups, generator=generator)
            offsets = zero_ENG.float() * factors[1].repeat_interleave(repeat, 2)
    weights = values.double() * scale_ENG.double().repeat_interleave(each, 2)
    if offsets is not None:
        weights = weights.float().double() - offsets.double().repeat_interleave(each, 2)
    memory = packed(codes_ENK, stored, zero_ENG, packing, factors)
    assert memory.numel() == packing.num_bytes(shape)
    return memory, weights.float()


@pytest.mark.parametrize("name", FORMS)
def test_unpacking(name: str) -> None:
    for columns, width in SHAPES:
        for order in ("bfloat16", "int8"):
            packing, shape = with_width(FORMS[name], width, order=order), (3, columns, width)
            memory, weights_ENK = made(shape, packing)
            for index in (0, 2):
                assert torch.equal(unpacked(memory, packing, shape, index, torch.float32), weights_ENK[index])
                last = unpacked(memory, packing, shape, index, torch.float32, first=1)
                assert torch.equal(last, weights_ENK[index][64:])


@pytest.mark.skipif(not serves_width(32), reason="not on this processor")
@pytest.mark.parametrize("name", FORMS)
def test_products(name: str) -> None:
    """Where a row is 1 at one input and 0 at all others, its product is that input's weights, rounded once."""
    for columns, width in SHAPES:
        packing, shape = with_width(FORMS[name], width), (2, columns, width)
        memory, weights_ENK = made(shape, packing)
        weights = weights_of_bits(memory, packing, shape)
        assert weights is not None
        x_TK = torch.eye(width).bfloat16().repeat(2, 1)
        output = torch.empty(2 * width, columns).bfloat16()
        weights.multiply_segments(output, x_TK, None, segments([(0, width), (1, width)], weights.most_rows))
        for index in range(2):
            found = output[index * width : (index + 1) * width].t()
            fused = weights_ENK[index].bfloat16()  # where there are offsets, the sum alone is rounded
            fused *= fused.abs() >= 2.0**-126  # the instruction for it takes smaller ones for 0
            if packing.zeros:
                near = torch.isclose(found.float(), fused.float(), rtol=2**-7, atol=0)
                assert bool(near.all()) and (found != fused).float().mean() < 0.01
            else:
                assert torch.equal(found, fused)


@pytest.mark.skipif(not serves_width(32) or not simd.BYTES, reason="not on this processor")
@pytest.mark.parametrize("name", WHOLE)
def test_in_whole_numbers(name: str) -> None:
    for columns, width in SHAPES:
        packing, shape = with_width(FORMS[name], width, order="int8", rounds_rows=True), (2, columns, width)
        memory, weights_ENK = made(shape, packing)
        weights = weights_of_bits(memory, packing, shape)
        assert weights is not None
        for rows in (1, 7, 70):
            x_TK, output = torch.randn(2 * rows, width).bfloat16(), torch.empty(2 * rows, columns).bfloat16()
            weights.multiply_segments(output, x_TK, None, segments([(0, rows), (1, rows)], weights.most_rows))
            for index in range(2):
                part = slice(index * rows, (index + 1) * rows)
                near_TK = rounded(x_TK[part].float(), packing.group).double()
                expected = near_TK @ weights_ENK[index].double().t()
                magnitude = near_TK.abs() @ weights_ENK[index].double().abs().t()
                error = (output[part].double() - expected).abs()
                assert bool((error <= expected.abs() * 2**-8 + magnitude * 2**-19).all())


@pytest.mark.parametrize("name", FORMS)
def test_where_no_kernel_serves(name: str) -> None:
    for columns, width in SHAPES:
        for order in ("bfloat16", "int8"):
            packing = with_width(FORMS[name], width, order=order)
            memory, weights_ENK = made((2, columns, width), packing)
            module = nn.Module()
            packed_weights(module)["weight"] = memory
            weight = PackedBits(module, "weight", packing, (2, columns, width), torch.float32)
            x_TK, bias_N = torch.eye(width), torch.randn(columns)
            output = multiplied(nn.functional.linear, x_TK, weight, 1, None)
            assert torch.equal(output.t(), weights_ENK[1])
            output = multiplied(nn.functional.linear, x_TK, weight, 1, bias_N)
            assert torch.equal(output.t(), weights_ENK[1] + bias_N[:, None])

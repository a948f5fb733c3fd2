"""Weights put into 4 bits, item by item as NumPy would do it, and what is no number."""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt
import pytest
import torch

from flexgen_lite.model.packing import Packing
from flexgen_lite.workers.compute.unpacked_weights import unpacked
from flexgen_lite.workers.loader.quantise_kernels import RANGES
from flexgen_lite.workers.loader.weight_packing import PackedTensor
from tests.packed_weights import packed

Floats = npt.NDArray[np.float32]


def quantised(weight: Floats, packing: Packing) -> bytes:
    arena = mmap.mmap(-1, packing.num_bytes(weight.shape))
    bits = weight.view(np.uint32)
    PackedTensor(packing, "float32", weight.shape, 0).fill(bits, "float32", 0, bits.strides, arena, 0)
    return arena[:]


def to_bfloat16(values: Floats) -> Floats:
    rounded: Floats = torch.from_numpy(values).bfloat16().float().numpy()
    return rounded


def multiply_add(x: Floats, y: Floats, z: Floats) -> Floats:
    """Rounded once."""
    return (x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)).astype(np.float32)


def best(weight: Floats, group: int, has_zeros: bool) -> tuple[Floats, Floats, Floats]:
    """q of each item, scale and zero of each group of `weight` [N, K]."""
    x_NGk = weight.reshape(len(weight), -1, group)
    low, high = (np.float32(0) + edge(x_NGk, axis=-1, initial=0) for edge in (np.fmin.reduce, np.fmax.reduce))
    span = high - low if has_zeros else np.maximum(high, -low)
    least, kept = np.full_like(span, np.inf), [np.full_like(span, np.nan), np.zeros_like(span), np.zeros_like(x_NGk)]
    for shrink in RANGES:
        size = span * np.float32(shrink / (15 if has_zeros else 7))
        scale, zero = to_bfloat16(np.maximum(size, np.float32(1e-30))), np.zeros_like(span)
        if has_zeros:
            zero = np.rint(low * np.float32(-shrink) / scale) - 8
        for _ in range(2):
            q = np.rint(x_NGk * (np.float32(1) / scale)[..., None]) + zero[..., None]
            whole = np.clip(q, -8, 7) - zero[..., None]
            rest = x_NGk - whole * scale[..., None]
            error, product, square = (np.zeros_like(span) for _ in range(3))
            for k in range(group):
                error = multiply_add(rest[..., k], rest[..., k], error)
                product = multiply_add(whole[..., k], x_NGk[..., k], product)
                square = multiply_add(whole[..., k], whole[..., k], square)
            is_less = error < least
            least = np.where(is_less, error, least)
            kept = [
                np.where(is_less[..., None] if new.ndim == 3 else is_less, new, old)
                for new, old in zip((scale, zero, whole + zero[..., None]), kept, strict=True)
            ]
            fitted = to_bfloat16(product / square)
            scale = np.where(fitted > 0, fitted, scale)
    return kept[2].reshape(weight.shape), kept[0], kept[1]


def weights() -> Floats:
    """Groups of every kind, in blocks of columns that are full."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((192, 96)).astype(np.float32)
    weight[1], weight[2], weight[3] = 0, np.abs(weight[2]), -np.abs(weight[3])
    weight[4, 5], weight[5, 40], weight[6, 70] = np.nan, np.inf, -np.inf
    for row, factor in enumerate((1e-40, 1e-33, 1e-28, 1e-20, 1e-5, 1e5, 1e17, 1e25, 1e37), start=7):
        weight[row] *= np.float32(factor)
    weight[20:40, ::7] *= 20
    weight[40, :32], weight[41, :32] = 0.75, -0.75
    return weight


@pytest.mark.parametrize("order", ["bfloat16", "int8"])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_every_bit(has_zeros: bool, order: str) -> None:
    weight = weights()
    for group in (32, 48):
        packing = Packing(4, group, order, "bfloat16", "uint8" if has_zeros else "")
        with np.errstate(all="ignore"):
            q, scale, zero = (torch.from_numpy(part)[None] for part in best(weight, group, has_zeros))
        expected = packed(q.long(), scale, zero.long() if has_zeros else None, packing)
        found = torch.frombuffer(bytearray(quantised(weight, packing)), dtype=torch.uint8)
        ends = packing.scales_at(weight.shape), packing.zeros_at(weight.shape)
        parts = zip(found.tensor_split(ends), expected.tensor_split(ends), strict=True)
        for (ours, theirs), dtype in zip(parts, (torch.uint8, torch.bfloat16, torch.uint8), strict=True):
            assert torch.equal(ours.view(dtype).nan_to_num(-1), theirs.view(dtype).nan_to_num(-1))


@pytest.mark.parametrize("order", ["bfloat16", "int8"])
@pytest.mark.parametrize("bits", [8, 4])
def test_no_scale_is_negative_and_what_is_not_finite_stays_so(bits: int, order: str) -> None:
    packing, weight = Packing(bits, 32, order, "bfloat16"), weights()
    weight[50, 0], weight[51, 31], weight[52, 40] = np.nan, np.nan, -np.nan
    data = quantised(weight, packing)
    scales = torch.frombuffer(bytearray(data[packing.scales_at(weight.shape) :]), dtype=torch.bfloat16).float()
    assert bool(((scales > 0) | scales.isnan()).all())
    found = unpacked(torch.frombuffer(bytearray(data), dtype=torch.uint8), packing, weight.shape, 0, torch.float32)
    is_finite = np.isfinite(weight).reshape(len(weight), -1, 32).all(-1).repeat(32, axis=1)
    rows = [4, 5, 6, 50, 51, 52]
    assert np.array_equal(np.isfinite(found[rows].numpy()), is_finite[rows])
    assert not found[:4].isnan().any() and not found[1].any()


def test_symmetric_weights_come_back() -> None:
    """What is 4 bits without zeros already, whichever end of the range it reaches."""
    rng = np.random.default_rng(1)
    q = rng.integers(-7, 8, (128, 64)).astype(np.float32)
    q[:, ::32], q[64:, ::32] = 7, -8
    scale = to_bfloat16(rng.uniform(0.001, 100, (128, 2)).astype(np.float32))
    weight = (q.reshape(128, 2, 32) * scale[..., None]).reshape(128, 64)
    packing = Packing(4, 32, "bfloat16", "bfloat16")
    assert (
        quantised(weight, packing)
        == packed(torch.from_numpy(q)[None].long(), torch.from_numpy(scale)[None], None, packing).numpy().tobytes()
    )

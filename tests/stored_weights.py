"""Weights in few bits as published checkpoints have them, packed by NumPy item by item, and what they stand for.

Each writer gives the tensors of a layer `x`, the `quantization_config`, and the weight `[N, K]` in float32, exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # half byte that has column j of eight


class Stored(NamedTuple):
    tensors: dict[str, torch.Tensor]
    section: dict[str, Any]
    weight: torch.Tensor


def stream(codes: Array, bits: int) -> Array:
    """Rows of codes as words of 32 bits: item i from bit i * `bits` on."""
    digits = (codes.astype(np.uint64)[..., None] >> np.arange(bits, dtype=np.uint64)) & np.uint64(1)
    digits = digits.reshape(len(codes), -1)
    filled = np.zeros((len(codes), -(-digits.shape[1] // 32) * 32), np.uint8)
    filled[:, : digits.shape[1]] = digits
    return np.packbits(filled, axis=1, bitorder="little").view(np.int32)


def sparse_stream(codes: Array, bits: int) -> Array:
    """The same without codes that go on in the next word."""
    each = 32 // bits
    filled = np.zeros((len(codes), -(-codes.shape[1] // each) * each), np.uint32)
    filled[:, : codes.shape[1]] = codes
    shifts = np.arange(each, dtype=np.uint32) * np.uint32(bits)
    words = (filled.reshape(len(codes), -1, each) << shifts).sum(-1, dtype=np.uint32)
    return np.ascontiguousarray(words).view(np.int32)


class Numbers:
    """Random codes `[N, K]`, and scales and zeros of their groups `[N, G]`."""

    def __init__(self, columns: int, width: int, group: int, bits: int, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.codes = self.random.integers(0, 1 << bits, (columns, width))
        self.zeros = self.random.integers(0, 1 << bits, (columns, width // group))
        self.scales = (self.random.random((columns, width // group)) * 0.1 + 0.01).astype(np.float16)
        self.groups = np.arange(width) // group

    def weight(self, zeros: Array | int | None = None) -> torch.Tensor:
        found = self.zeros[:, self.groups] if zeros is None else zeros
        scales = self.scales.astype(np.float32)[:, self.groups]
        return torch.from_numpy((self.codes - found).astype(np.float32) * scales)


def tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def gptq(
    columns: int, width: int, group: int, bits: int = 4, version: str = "gptq_v2", is_sorted: bool = False
) -> Stored:
    n = Numbers(columns, width, group, bits)
    if is_sorted:
        n.groups = n.random.permutation(n.groups)
    fields = stream(n.zeros.T, bits)
    if version == "gptq":  # as gptqmodel does it: a one less for each field of a word, which may borrow
        if 32 % bits:
            fields = stream((n.zeros.T - 1) & ((1 << bits) - 1), bits)
        else:
            fields = fields - np.int32(sum(1 << place for place in range(0, 31, bits)))
    found = {
        "x.qweight": tensor(stream(n.codes, bits).T),
        "x.qzeros": tensor(fields),
        "x.scales": tensor(n.scales.T),
        "x.g_idx": tensor(n.groups.astype(np.int32)),
    }
    section = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": False, "checkpoint_format": version}
    return Stored(found, section, n.weight())


def awq(columns: int, width: int, group: int, version: str = "gemm", zero_point: bool = True) -> Stored:
    n = Numbers(columns, width, group, 4)
    section = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": zero_point, "version": version}
    if version == "gemm":
        found = {"x.qweight": tensor(_awq_words(n.codes.T)), "x.scales": tensor(n.scales.T)}
        if zero_point:
            found["x.qzeros"] = tensor(_awq_words(n.zeros.T))
        return Stored(found, section, n.weight(None if zero_point else 8))
    filled = -(-(width // group) // 8) * 8 * (2 if version == "gemv" else 1)
    more = filled - width // group
    scales, zeros = (np.pad(items, ((0, 0), (0, more))) for items in (n.scales, n.zeros))
    if version == "gemv":
        found = {"x.qweight": stream(n.codes, 4), "x.qzeros": stream(zeros, 4), "x.scales": scales}
        return Stored({name: tensor(part) for name, part in found.items()}, section, n.weight())
    offsets = (-zeros * scales.astype(np.float32)).astype(np.float16)
    # Of 32 items, number 8 c + 2 a + b comes at 8 a + 4 b + c; of 64, four rows follow each other.
    codes = n.codes.reshape(columns, -1, 4, 4, 2).transpose(0, 1, 3, 4, 2).reshape(columns // 4, 4, -1, 64)
    words = stream(codes.transpose(0, 2, 1, 3).reshape(columns // 4, -1), 4).view(np.int16)
    found = {"x.qweight": words, "x.qzeros": offsets.T, "x.scales": scales.T}
    exact = n.weight(0) + torch.from_numpy(offsets[:, n.groups].astype(np.float32))
    return Stored({name: tensor(part) for name, part in found.items()}, section, exact)


def _awq_words(codes: Array) -> Array:
    """`[R, C]` as `[R, C / 8]`."""
    eight = codes.reshape(len(codes), -1, 8).astype(np.uint32)
    return (eight << (4 * np.array(AWQ_ORDER, np.uint32))).sum(-1, dtype=np.uint32).view(np.int32)


def compressed(
    columns: int,
    width: int,
    group: int,
    bits: int = 4,
    has_zeros: bool = False,
    is_sorted: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    is_sparse: bool = False,
) -> Stored:
    """`is_sparse`: no code goes on in the next word."""
    n = Numbers(columns, width, group, bits)
    n.scales = tensor(n.scales).to(scale_dtype).float().numpy()
    if is_sorted:
        n.groups = n.random.permutation(n.groups)
    found = {
        "x.weight_packed": tensor((sparse_stream if is_sparse else stream)(n.codes, bits)),
        "x.weight_scale": tensor(n.scales).to(scale_dtype),
        "x.weight_shape": torch.tensor([columns, width]),
    }
    if has_zeros:
        found["x.weight_zero_point"] = tensor(stream(n.zeros.T, bits).T)
    if is_sorted:
        found["x.weight_g_idx"] = tensor(n.groups.astype(np.int32))
    weights = {"num_bits": bits, "type": "int", "symmetric": not has_zeros, "strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    section = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return Stored(found, section, n.weight(None if has_zeros else 1 << (bits - 1)))

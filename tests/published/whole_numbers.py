"""Weights in whole numbers: GPTQ's and AWQ's words, bytes with a sign, and torchao's halves.

Sources: gptqmodel 7.7 and AutoAWQ 0.2.9 (what lies where in a word); compressed-tensors 0.20 (int-quantized); torchao
0.18 (Int4Tensor).
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import pad

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""The half byte of a word that has column j of its eight."""


def unsigned(
    weight: torch.Tensor, bits: int, group: int | None, is_symmetric: bool, scale_dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes from 0 on `[N, K]`, scales and zeros `[N, groups]`, and the weight (code - zero) * scale."""
    columns, width = weight.shape
    runs, top = weight.view(columns, -1, group or width), (1 << bits) - 1
    low, high = runs.amin(-1, keepdim=True).clamp(max=0), runs.amax(-1, keepdim=True).clamp(min=0)
    if is_symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / top).clamp(min=1e-4).to(scale_dtype)
    zero = torch.full_like(low, 1 << (bits - 1)) if is_symmetric else (-low / scale.float()).round().clamp(0, top)
    codes = (runs / scale.float() + zero).round().clamp(0, top)
    exact = ((codes - zero) * scale.float()).view(columns, width)
    return codes.view(columns, width).long(), scale[..., 0], zero[..., 0].long(), exact


def stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Of each row the bits of all codes, the lowest first, in words of int32."""
    digits = (codes[..., None] >> torch.arange(bits)) & 1
    data = np.packbits(digits.flatten(1).to(torch.uint8).numpy(), axis=1, bitorder="little")
    return torch.from_numpy(data.view(np.int32))


def gptq(
    weight: torch.Tensor, bits: int, group: int | None, is_symmetric: bool, version: int, is_sorted: bool = True
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Where inputs are not `is_sorted` (desc_act), those of a group are anywhere."""
    width = weight.shape[1]
    places = torch.arange(width) if is_sorted else scattered(weight)
    codes, scale, zero, exact = unsigned(weight[:, places], bits, group, is_symmetric)
    codes, exact = codes[:, places.argsort()], exact[:, places.argsort()]
    words = stream(zero.t().contiguous(), bits)
    if version == 1 and 32 % bits:  # the only ones with fields across words; there are no zeros of 0 in the tests
        words = stream(zero.t().contiguous() - 1, bits)
    elif version == 1:  # as gptqmodel does it: of whole words, so that a zero of 0 borrows of its neighbour
        ones = sum(1 << place for place in range(0, 32, bits))
        words = torch.from_numpy((words.numpy().view(np.uint32) - np.uint32(ones)).view(np.int32))
    order = places.argsort().int() // (group or width)
    parts = {".qweight": stream(codes, bits).t(), ".qzeros": words, ".scales": scale.t(), ".g_idx": order}
    return parts, exact


def scattered(weight: torch.Tensor) -> torch.Tensor:
    """Another order of inputs for every weight."""
    generator = torch.Generator().manual_seed(int(weight.abs().sum().item() * 1000))
    return torch.randperm(weight.shape[1], generator=generator)


def awq_gemv(weight: torch.Tensor, group: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Words along inputs. Words of zeros are filled up, to four of them for groups of 32; scales likewise."""
    codes, scale, zero, exact = unsigned(weight, 4, group, False)
    filled = -(-scale.shape[1] // 8)
    filled += -filled % max(1, 128 // group)
    more = (0, 8 * filled - scale.shape[1])
    return {".qweight": stream(codes, 4), ".qzeros": stream(pad(zero, more), 4), ".scales": pad(scale, more)}, exact


def awq(weight: torch.Tensor, group: int, is_symmetric: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    codes, scale, zero, exact = unsigned(weight, 4, group, is_symmetric)
    return {".qweight": awq_words(codes.t()), ".qzeros": awq_words(zero.t()), ".scales": scale.t()}, exact


def awq_words(codes: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits `[R, C]` as int32 `[R, C / 8]`."""
    eights = codes.unflatten(1, (-1, 8)).numpy().astype(np.uint32)
    words = sum(eights[..., column] << np.uint32(4 * place) for column, place in enumerate(AWQ_ORDER))
    return torch.from_numpy(np.asarray(words, np.uint32).view(np.int32))


def signed(
    weight: torch.Tensor, bits: int, group: int | None, is_symmetric: bool, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q in int8 `[N, K]`, scales and zeros `[N, groups]`, and the weight (q - zero) * scale."""
    codes, scale, zero, exact = unsigned(weight, bits, group, is_symmetric, scale_dtype)
    middle = 1 << (bits - 1)
    return (codes - middle).to(torch.int8), scale, (zero - middle).to(torch.int8), exact


def with_offsets(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of 4 bits in two's complement, the first lower, int8 `[N, K / 2]`; scales and offsets, bfloat16 `[groups,
    N]`; and the weight q * scale + offset."""
    runs = weight.unflatten(1, (-1, group))
    low, high = runs.amin(-1, keepdim=True), runs.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6).bfloat16()
    offset = (low + 8 * scale.float()).bfloat16()
    q = ((runs - offset.float()) / scale.float()).round().clamp(-8, 7)
    exact = (q * scale.float() + offset.float()).flatten(1)
    q = q.flatten(1).to(torch.int8)
    return q[:, 1::2] << 4 | q[:, ::2] & 15, scale[..., 0].t(), offset[..., 0].t(), exact

"""Weights of 8 and 4 bits put into their order by PyTorch, step by step as packing.py says it."""

from __future__ import annotations

import torch

from flexgen_lite.model.packing import COLUMNS, Packing, num_blocks


def packed(
    q_ENK: torch.Tensor,
    scale_ENG: torch.Tensor,
    zero_ENG: torch.Tensor | None,
    packing: Packing,
    factors: tuple[torch.Tensor, ...] = (),
) -> torch.Tensor:
    """All bytes of weights with whole numbers `q_ENK`, or codes of another kind, G groups along K.

    Args:
        zero_ENG: or offsets.
        factors: `[E, N, K / factor_group]`, of scales and of offsets.
    """
    count, columns, width = q_ENK.shape
    blocks, middle = num_blocks(columns), 8 if packing.bits == 4 else 128
    codes = torch.zeros((count, blocks * COLUMNS, width), dtype=torch.int64)
    codes[:, :columns] = q_ENK
    if packing.kind == "int" and (packing.bits == 4 or packing.order == "int8"):
        codes += middle
    codes = (codes & 255).view(count, blocks, COLUMNS, width)
    if packing.order == "bfloat16":
        items = packing.bits and (4 if packing.bits == 8 else 8)
        codes = codes.view(count, blocks, COLUMNS, -1, items, 2).permute(0, 1, 3, 2, 5, 4)
        if packing.bits == 4:
            codes = codes[..., 0::2] | (codes[..., 1::2] << 4)
    else:
        codes = codes.view(count, blocks, COLUMNS, -1, 8 // packing.bits, 4).permute(0, 1, 3, 2, 4, 5)
        codes = codes[..., 0, :] if packing.bits == 8 else codes[..., 0, :] | (codes[..., 1, :] << 4)
    parts = [codes.to(torch.uint8).reshape(-1)]
    parts.append(_by_block(scale_ENG).to(getattr(torch, packing.scale_dtype)).reshape(-1).view(torch.uint8))
    if zero_ENG is not None and packing.zeros == "float32":
        parts.append(_by_block(zero_ENG).reshape(-1).view(torch.uint8))
    elif zero_ENG is not None:
        bias = 0 if packing.zeros == "scaled" else middle
        parts.append((_by_block(zero_ENG) + bias).to(torch.uint8).reshape(-1))
    parts += [_by_block(factor).to(getattr(torch, packing.factors)).reshape(-1).view(torch.uint8) for factor in factors]
    return torch.cat(parts)


def _by_block(values_ENG: torch.Tensor) -> torch.Tensor:
    """`[E, block, G, column]`."""
    count, columns, groups = values_ENG.shape
    filled = values_ENG.new_zeros((count, num_blocks(columns) * COLUMNS, groups))
    filled[:, :columns] = values_ENG
    return filled.view(count, -1, COLUMNS, groups).transpose(2, 3).contiguous()

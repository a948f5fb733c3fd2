"""Weights as bitsandbytes 0.50 writes them.

Sources: QLoRA (arXiv 2305.14314), which defines NF4 and double quantisation; LLM.int8() (2208.07339); bitsandbytes'
documentation of its quant_state.
"""

from __future__ import annotations

import json

import torch

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
_FP4 = torch.tensor([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]) / 12
TABLES = {"nf4": NF4, "fp4": torch.cat((_FP4, -_FP4))}
BLOCK, NESTED = 64, 256


def four_bits(
    weight: torch.Tensor, kind: str, is_double: bool = False, storage: torch.dtype = torch.uint8
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A scale for 64 items, whatever rows they are of; with `is_double` these scales are in 8 bits."""
    table, state = TABLES[kind], {"quant_type": kind, "blocksize": BLOCK, "dtype": "bfloat16"}
    state["shape"] = list(weight.shape)
    runs = weight.reshape(-1, BLOCK)
    absmax = runs.abs().amax(1).clamp(min=1e-6)
    parts = {".weight.quant_map": table}
    if is_double:
        parts[".weight.nested_quant_map"] = codebook = (
            torch.linspace(-1, 1, 256).sign() * torch.linspace(-1, 1, 256) ** 2
        )
        offset = absmax.mean().item()
        padded = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % NESTED)).view(-1, NESTED)
        nested = padded.abs().amax(1)
        codes = (padded / nested[:, None]).flatten()[: len(absmax), None].sub(codebook).abs().argmin(1)
        parts |= {".weight.absmax": codes.to(torch.uint8), ".weight.nested_absmax": nested}
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
        absmax = codebook[codes] * nested.repeat_interleave(NESTED)[: len(absmax)] + torch.tensor(offset)
    else:
        parts[".weight.absmax"] = absmax
    codes = (runs / absmax[:, None])[..., None].sub(table).abs().argmin(-1)
    exact = (table[codes] * absmax[:, None]).view(weight.shape)
    pairs = codes.view(-1, 2).to(torch.uint8)
    parts[".weight"] = (pairs[:, 0] << 4 | pairs[:, 1]).view(storage)[:, None]
    text = json.dumps(state).encode()
    parts[f".weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return parts, exact


def eight_bits(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of each output the largest item, 127 times its scale."""
    most = weight.abs().amax(1)
    q = (weight * (127 / most.clamp(min=1e-6))[:, None]).round().to(torch.int8)
    parts = {".weight": q, ".SCB": most, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, q.float() * (most * (1 / 127))[:, None]

"""Weights in 8 and 4 bits of floating point with scales: FP8 (E4M3), MXFP8, MXFP4 and NVFP4.

Sources: OCP Microscaling Formats 1.0 (E2M1, E4M3, E8M0); DeepSeek-V3's README_WEIGHTS.md (weight_scale_inv); the model
cards and config.json of gpt-oss; compressed-tensors' and ModelOpt's descriptions of NVFP4.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MOST_E4M3, MOST_E2M1 = 448.0, 6.0
POWERS = ("float8_e8m0fnu", "uint8")


def spread(scales: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """Each over its block; those at the edges are cut."""
    rows = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return rows[..., : shape[-2], : shape[-1]]


def largest(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    columns, width = weight.shape
    padded = pad(weight.abs(), (0, -width % block[1], 0, -columns % block[0]))
    return padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).amax((1, 3))


def e4m3(
    weight: torch.Tensor, block: tuple[int, int] | None, kind: str = "float32"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 items, scales as they are stored in dtype `kind`, and the weight that they stand for.

    Args:
        block: rows and inputs that have one scale; None: all of it.
    """
    block = (weight.shape[0], weight.shape[1]) if block is None else block
    wanted = (largest(weight, block) / MOST_E4M3).clamp(min=2.0**-100)
    if kind in POWERS:
        scale = torch.exp2(wanted.log2().ceil())
        stored = (scale.log2() + 127).to(torch.uint8)
        stored = stored if kind == "uint8" else stored.view(torch.float8_e8m0fnu)
    else:
        stored = wanted.to(getattr(torch, kind))
        scale = stored.float()
    scales = spread(scale, block, weight.shape)
    q = (weight / scales).clamp(-MOST_E4M3, MOST_E4M3).to(torch.float8_e4m3fn)
    return q, stored, q.float() * scales


def e2m1(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of the nearest codes, the first in the lower half of a byte, and what they stand for."""
    places = (values.abs()[..., None] - E2M1).abs().argmin(-1)
    codes = (places | ((values < 0).long() << 3)).to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, E2M1[places] * torch.where(values < 0, -1.0, 1.0)


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs `[N, K / 2]`, exponents + 127 `[N, K / 32]`, and the weight."""
    exponents = largest(weight, (1, 32)).clamp(min=2.0**-100).log2().floor() - 2
    scales = spread(torch.exp2(exponents), (1, 32), weight.shape)
    pairs, values = e2m1(weight / scales)
    return pairs, (exponents + 127).to(torch.uint8), values * scales


def nvfp4(weight: torch.Tensor, divides: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs `[N, K / 2]`, scales in E4M3 `[N, K / 16]`, the number that goes with all of them, and the weight.

    Args:
        divides: the number is one to divide by.
    """
    factor = weight.abs().max() / (MOST_E4M3 * MOST_E2M1)
    stored = (largest(weight, (1, 16)) / MOST_E2M1 / factor).clamp(max=MOST_E4M3).to(torch.float8_e4m3fn)
    number = 1 / factor if divides else factor
    scales = spread(stored.float() / number if divides else stored.float() * number, (1, 16), weight.shape)
    pairs, values = e2m1(torch.where(scales > 0, weight / scales, 0.0))
    return pairs, stored, number, values * scales

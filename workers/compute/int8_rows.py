"""Rows of keys and values as a KV cache of 8 bits keeps them.

The attention workers round what they store (workers/attention/kernels.py); a prompt's own attention, which is computed
here, is to see the same.
"""

from __future__ import annotations

import torch


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """Of rows along the last dimension, each with a scale of its own, what is kept; in their own dtype again."""
    wide = rows.float()
    scales = wide.abs().amax(-1, keepdim=True) / 127
    kept = torch.round(wide / scales).mul_(scales).masked_fill_(scales == 0, 0)
    return kept.to(rows.dtype)

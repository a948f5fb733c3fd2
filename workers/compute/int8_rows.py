"""Rows of keys and values as a KV cache of 8 bits keeps them.

The attention workers round what they store (workers/attention/kernels.py); a prompt's own attention, which is computed
here, is to see the same.
"""

from __future__ import annotations

from functools import cache

import torch


def prepare(device: torch.device, dtype: torch.dtype) -> None:
    """Loads what `rounded` will need, or compiles it."""
    if device.type == "cpu":
        from flexgen_lite.workers.compute import int8_row_kernel  # numba, which nothing needs on a GPU

        int8_row_kernel.prepare(dtype)


def rounded(rows_1GTD: torch.Tensor, order: int) -> torch.Tensor:
    """What is kept of each row, in its own dtype again: rounded with a scale of its own, between two products with
    Hadamard matrices of `order`."""
    if rows_1GTD.device.type == "cpu":
        from flexgen_lite.workers.compute import int8_row_kernel

        if int8_row_kernel.serves(rows_1GTD):
            return int8_row_kernel.rounded(rows_1GTD, order)
    turned = _multiplied(rows_1GTD.float(), order)
    scales = turned.abs().amax(-1, keepdim=True) / 127
    kept = torch.round(turned / scales).mul_(scales / order).masked_fill_(scales == 0, 0)
    return _multiplied(kept, order).to(rows_1GTD.dtype)


def _multiplied(rows: torch.Tensor, order: int) -> torch.Tensor:
    if order == 1:
        return rows
    return torch.matmul(rows.unflatten(-1, (-1, order)), _matrix(order, rows.device)).flatten(-2)


@cache
def _matrix(order: int, device: torch.device) -> torch.Tensor:
    """As in workers/hadamard.py."""
    matrix = torch.ones(1, 1)
    while 4 * len(matrix) <= order:
        matrix = torch.kron(torch.ones(4, 4) - 2 * torch.eye(4), matrix)
    if len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix.to(device)

"""A tensor of a checkpoint, and what lies behind it where it is stored in few bits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a file: row-major, `num_bytes` at `offset` from the start of `files[file]`.

    With `bits` it stands for a weight in few bits: `dtype` and `shape` are those that it has once it is unpacked, and
    the place in the file is that of its values.
    """

    name: str
    file: int
    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]
    bits: StoredBits | None = None


@dataclass(frozen=True, slots=True)
class StoredBits:
    """A weight `[N, K]` in the format "pack-quantized" of compressed-tensors, row by row.

    Attributes:
        group: items of K with one scale.
        values: `[N, K / (32 / num_bits)]` of int32, q + 8 or q + 128, the first item lowest.
        scales: `[N, K / group]`.
        zeros: `[N / (32 / num_bits), K / group]` of int32, rounded up: zero + 8 or + 128 of so many n in each.
    """

    num_bits: int
    group: int
    values: StoredTensor
    scales: StoredTensor
    zeros: StoredTensor | None

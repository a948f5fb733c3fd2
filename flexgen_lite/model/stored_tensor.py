"""A tensor of a checkpoint, and what lies behind it where it is stored in few bits."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_lite.model.spec import StoredPart


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as it lies in a file: row-major, `num_bytes` at `offset` from the start of `files[file]`.

    With `bits` it stands for a weight `[N, K]` in few bits: `dtype` and `shape` are those that it has once it is
    unpacked, and the place in the file is that of its values. With `members` it stands for several of these,
    `[E, N, K]`, or `[E, K, N]` where it `is_turned`.
    """

    name: str
    file: int
    offset: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]
    bits: StoredBits | None = None
    members: tuple[StoredTensor, ...] = ()
    is_turned: bool = False


@dataclass(frozen=True, slots=True)
class StoredBits:
    """A weight `[N, K]` in few bits: how it is kept in memory (packing.py), and from what.

    Attributes:
        num_bits: of a code in memory, 4 or 8.
        parts: each with the tensor that it is read from.
        finish: as in Packing.
        order: a digest of what says which group an input is in; b"": each group is a run of inputs.
    """

    kind: str
    num_bits: int
    group: int
    scale_dtype: str
    zeros: str
    parts: tuple[tuple[StoredPart, StoredTensor], ...]
    order: bytes = b""
    finish: str = ""

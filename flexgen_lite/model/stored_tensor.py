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

    With `paired_rows` its rows are runs of so many, the halves of each run by turns: row 2 i of a run is row i of its
    first half, row 2 i + 1 that of its second.

    With a `fault` it cannot be read, which counts where the model has it.
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
    paired_rows: int = 0
    fault: str = ""


@dataclass(frozen=True, slots=True)
class StoredBits:
    """A weight `[N, K]` in few bits: how it is kept in memory (packing.py), and from what.

    Attributes:
        kind: "": it is not kept in few bits, but made of what is stored otherwise.
        num_bits: of a code in memory, 4 or 8.
        parts: each with the tensor that it is read from.
        finish, factors, factor_group, divides: as in Packing.
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
    factors: str = ""
    factor_group: int = 0
    divides: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether weights are whole numbers times scales."""
        return self.kind == "int" and self.zeros in ("", "uint8")

    @property
    def is_in_one_piece(self) -> bool:
        """Whether items have their scales beside them."""
        return all(part.fills == "all" for part, _ in self.parts)

    @property
    def in_blocks(self) -> tuple[StoredTensor, StoredPart, StoredTensor] | None:
        """Values in FP8, and scales for blocks of them, where that is all there is."""
        if self.kind != "e4m3" or self.finish or len(self.parts) != 2:
            return None
        (part, values), (scale_part, scales) = self.parts
        plain = part.layout == "stream" and scale_part.layout == "items" and not scale_part.others
        return (values, scale_part, scales) if plain else None

"""A run of the lines of a source (stored_layouts.py), and what a layout can do with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexgen_lite.model.packing import Packing
from flexgen_lite.model.spec import StoredPart
from flexgen_lite.workers.loader.weight_cast import Bits


@dataclass(frozen=True, slots=True)
class Lines:
    """A run of a source's lines.

    Attributes:
        bytes: uint8 `[lines, bytes of a line]`.
        dtype: of the source's items.
        others: arrays of the bits of what `part.others` names.
        packing: of the weight in memory; None: it is not in few bits there.
        width: K.
        first: item of K that they begin with, where they are turned; row, where they are unpacked.
    """

    bytes: Bits
    part: StoredPart
    dtype: str
    others: Sequence[Bits]
    packing: Packing | None
    width: int
    first: int = 0

    @property
    def kept(self) -> Packing:
        """Of the weight in memory, where it is in few bits there."""
        assert self.packing is not None
        return self.packing

    @property
    def group(self) -> int:
        """Items of K with one scale, in memory."""
        return self.kept.group

    def words(self, kind: type[np.unsignedinteger[Any]]) -> Bits:
        """The same bytes as larger words, in memory that these may lie in."""
        size, lines = kind().itemsize, self.bytes
        if lines.__array_interface__["data"][0] % size:
            lines = lines.copy()
        return lines.view(kind)


@dataclass(frozen=True, slots=True)
class Layout:
    """
    Attributes:
        decode: rows of words; of scales and offsets rows of float32; of zeros rows of bytes. Where a part is all, all
            of these that there are, by what they fill.
        line_bytes: of a part of a weight `[N, K]` whose items are of a dtype.
        unit: lines that are decoded together, and the rows, or items of K, that they are for.
    """

    decode: Callable[[Lines], Any]
    line_bytes: Callable[[StoredPart, int, int, str], int]
    unit: Callable[[StoredPart], tuple[int, int]] = lambda part: (1, part.block[0])
    is_turned: bool = False

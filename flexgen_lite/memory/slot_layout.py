"""Where the tensors of a unit lie in its slot, and which file runs are read straight into place.

A slot, with F = 4096:

    | extent 0: F-blocks of a file, tensors where they lie in them | extent 1 | ... | converted, by 64 | pad |

An extent starts and ends on multiples of F in the file and in the slot, so it can be read with O_DIRECT. What
lies between its tensors (the ends of neighbours, small gaps) is read along and ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexgen_lite.model.packing import Packing
from flexgen_lite.model.spec import ITEM_BYTES, Extent, SourcePiece, TensorSpec, UnitSpec

BLOCK_BYTES = 4096  # of O_DIRECT: a multiple of every usual logical block size
MAX_GAP_BYTES = 64 * 1024  # reading this much for nothing costs less than another read
CONVERTED_ALIGN = 64


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor before it has a place: what the model wants (`dtype`, `shape`) and what it is filled from."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[SourcePiece, ...]
    packing: Packing | None = None

    @property
    def num_bytes(self) -> int:
        if self.packing is not None:
            return self.packing.num_bytes(self.shape)
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def direct(self) -> bool:
        """True if the file's bytes are the tensor's bytes and can lie aligned in the slot."""
        if len(self.pieces) != 1 or not self.num_bytes or self.packing is not None:
            return False
        piece = self.pieces[0]
        return (
            piece.source_dtype == self.dtype
            and not piece.views
            and piece.part is None
            and _whole(piece.region, self.shape)
            and piece.num_bytes == self.num_bytes
            and piece.offset % ITEM_BYTES[self.dtype] == 0
        )


def layout_unit(name: str, sources: Sequence[TensorSource], max_gap: int = MAX_GAP_BYTES) -> UnitSpec:
    """Place `sources` in a slot. The tensors of the result are in the order of `sources`; bytes of the file between two
    of them that are fewer than `max_gap` lie in the slot as well."""
    offsets: dict[int, int] = {}
    extents: list[Extent] = []
    cursor = 0
    for run in _runs(sources, max_gap):
        first, last = sources[run[0]].pieces[0], sources[run[-1]].pieces[0]
        start = first.offset // BLOCK_BYTES * BLOCK_BYTES
        length = _round_up(last.offset + last.num_bytes, BLOCK_BYTES) - start
        extents.append(Extent(first.file, start, length, cursor))
        for index in run:
            offsets[index] = cursor + sources[index].pieces[0].offset - start
        cursor += length
    converted = tuple(index for index in range(len(sources)) if index not in offsets)
    for index in converted:
        offsets[index] = cursor
        cursor += _round_up(sources[index].num_bytes, CONVERTED_ALIGN)
    tensors = tuple(
        TensorSpec(
            source.name, source.dtype, source.shape, offsets[index], source.num_bytes, source.pieces, source.packing
        )
        for index, source in enumerate(sources)
    )
    return UnitSpec(name, tensors, tuple(extents), converted, _round_up(cursor, BLOCK_BYTES))


def _runs(sources: Sequence[TensorSource], max_gap: int) -> Iterable[list[int]]:
    """Indices of direct tensors that lie close together in one file, in file order.

    Of two tensors that share bytes only the first is in a run; the other one is converted (copied).
    """
    direct = [index for index, source in enumerate(sources) if source.direct]
    direct.sort(key=lambda index: (sources[index].pieces[0].file, sources[index].pieces[0].offset))
    run: list[int] = []
    for index in direct:
        piece = sources[index].pieces[0]
        if run:
            before = sources[run[-1]].pieces[0]
            gap = piece.offset - (before.offset + before.num_bytes)
            if piece.file == before.file and gap < 0:
                continue
            if piece.file != before.file or gap >= max_gap:
                yield run
                run = []
        run.append(index)
    if run:
        yield run


def _whole(region: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> bool:
    return not region or region == tuple((0, size) for size in shape)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

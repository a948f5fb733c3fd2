"""Puts weights that are in few bits already, as they lie in a checkpoint, into the order of packing.py.

Values, scales and zeros are read apart, each in runs of lines (stored_layouts.py): where a row or an item of K goes
does not depend on the others.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from flexgen_lite.memory.arena import Memory
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.formats.layers import FLOATS
from flexgen_lite.model.packing import COLUMNS, Packing, num_blocks
from flexgen_lite.model.spec import ITEM_BYTES, SmallSource, SourcePiece, StoredPart, TensorSpec
from flexgen_lite.workers.loader.float_items import from_float32, is_finite
from flexgen_lite.workers.loader.lines import Lines
from flexgen_lite.workers.loader.stored_layouts import (
    LAYOUTS,
    are_finite,
    num_lines,
    order_of,
)
from flexgen_lite.workers.loader.weight_cast import Bits, bits_type
from flexgen_lite.workers.loader.weight_packing import PackedParts, PackedTensor

_SHARES = 4  # of columns, that are written by one thread at a time
ReadSmall = Callable[[SmallSource], bytes]


class NotFiniteError(ValueError):
    """Scales of the tensor whose name it has are infinite or no numbers."""


@dataclass(frozen=True, slots=True)
class ChunkOfBits:
    """A run of a source's lines that has `num_rows` rows of a weight, `skipped` behind the first that its first line
    has, from item `first` of K on.

    They are counted from `row` on through `shape`; that of index (i, j ...) would begin at `begin` + i, j ... times
    `strides`, in bytes from the start of the tensor, were it in 16 bits.
    """

    file: int
    offset: int
    num_bytes: int
    dtype: str
    part: StoredPart
    num_lines: int
    num_rows: int
    skipped: int
    first: int
    begin: int
    row: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    packed: PackedTensor
    others: tuple[Bits, ...]
    locks: tuple[threading.Lock, ...]
    name: str

    def convert(self, bounce: Memory, bounce_offset: int, arena: Memory, slot_offset: int) -> None:
        """Put the chunk, whose bytes are at `bounce_offset`, in its place."""
        packing = self.packed.packing
        count, _, width = packing.dimensions(self.packed.shape)
        shape = (self.num_lines, self.num_bytes // self.num_lines)
        lines = Lines(
            np.ndarray(shape, np.uint8, bounce, bounce_offset),
            self.part, self.dtype, self.others, packing, width, self.first,
        )  # fmt: skip
        if self.part.fills in ("scales", "offsets", "factors") and not are_finite(lines):
            raise NotFiniteError(self.name)
        if self.part.layout in ("words", "awq_words"):
            self._put_turned(lines, self.packed.parts(arena, slot_offset, count)[0])
            return
        if self.part.layout == "sorted_words":
            self._put_sorted(lines, self.packed.parts(arena, slot_offset, count)[0])
            return
        found, part = LAYOUTS[self.part.layout].decode(lines), self.part
        if part.fills == "order":
            self._put_order(found, self.packed.order(arena, slot_offset))
            return
        for fills, rows in (found if part.fills == "all" else {part.fills: found}).items():
            if part.fills == "all" and not _are_finite(rows, fills, packing):
                raise NotFiniteError(self.name)
            self._put(fills, rows, self.packed.parts(arena, slot_offset, count))

    def _put(self, fills: str, rows: Bits, targets: PackedParts) -> None:
        from flexgen_lite.workers.loader import order_kernels

        packing, layout = self.packed.packing, LAYOUTS[self.part.layout]
        _, _, width = packing.dimensions(self.packed.shape)
        if not layout.is_turned and self.part.block[0] > 1 and len(rows) < self.skipped + self.num_rows:
            rows = np.repeat(rows, self.part.block[0], axis=0)
        rows = np.ascontiguousarray(rows[self.skipped : self.skipped + self.num_rows])
        if fills == "values":
            put, item = order_kernels.of_values(packing)
            steps = width * packing.bits // 8 // item().itemsize
            first = self.first * packing.bits // 8 // item().itemsize
            put(rows, self._places(steps, first), targets.values.view(item))
            return
        group = packing.factor_group if fills in ("factors", "lows") else packing.group
        places = self._places(width // group, self.first // group)
        if fills == "scales":
            order_kernels.put_items(_as_stored(rows, packing.scale_dtype), places, targets.scales)
        elif fills == "zeros":
            order_kernels.put_items(rows, places, targets.zeros)
        elif fills == "offsets":
            order_kernels.put_items(rows.view(np.uint32), places, targets.zeros.view(np.uint32))
        else:
            target = targets.factors if fills == "factors" else targets.lows
            order_kernels.put_items(rows.view(target.dtype), places, target)

    def _put_order(self, order: Bits, target: Bits) -> None:
        _, columns, _ = self.packed.packing.dimensions(self.packed.shape)
        for index in np.unique(self._rows() // columns):
            target[index] = order

    def _put_turned(self, lines: Lines, values: Bits) -> None:
        from flexgen_lite.workers.loader import layout_kernels, order_kernels

        packing = self.packed.packing
        _, _, width = packing.dimensions(self.packed.shape)
        form, item = order_kernels.form_of(packing)
        steps, first = (count * packing.bits // 8 // item().itemsize for count in (width, self.first))
        bits = 0 if self.part.layout == "awq_words" else self.part.num_bits
        words, places = lines.words(np.uint32), self._places(steps, first)
        layout_kernels.put_words(words, bits, form, self.skipped, places, values.view(item))

    def _put_sorted(self, lines: Lines, values: Bits) -> None:
        """Items go among those of other chunks, into words that these change, too."""
        from flexgen_lite.workers.loader import layout_kernels, order_kernels

        packing, words = self.packed.packing, lines.words(np.uint32)
        order = order_of(self.others[0])
        place: Bits = np.empty(order.size, np.int64)
        place[order] = np.arange(order.size)
        first, count = self.first, self.num_lines * 32 // self.part.num_bits
        steps, shifts, kind = order_kernels.item_places(packing, place[first : first + count])
        places = self._places(order.size * packing.bits // 8 // kind().itemsize, 0)
        sign = 128 if packing.order == "bfloat16" and packing.bits == 8 else 0
        each, turn = -(-self.num_rows // _SHARES), self.first // len(steps)
        for number in range(turn, turn + _SHARES):  # chunks begin at different columns: none waits for another
            begin, lock = number % _SHARES * each, self.locks[number % _SHARES]
            with lock:
                layout_kernels.scatter_words(
                    words, self.skipped + begin, self.part.num_bits, sign, steps * COLUMNS, shifts,
                    places[begin : begin + each], values.view(kind),
                )  # fmt: skip

    def _places(self, steps: int, first: int) -> Bits:
        """Where item `first` of each row goes, in items of which a row has `steps`; the next goes COLUMNS further."""
        _, columns, _ = self.packed.packing.dimensions(self.packed.shape)
        rows = self._rows()
        blocks = rows // columns * num_blocks(columns) + rows % columns // COLUMNS
        return np.asarray(blocks * (steps * COLUMNS) + rows % columns % COLUMNS + first * COLUMNS, dtype=np.int64)

    def _rows(self) -> Bits:
        """Their numbers, counted through all weights of the tensor."""
        packed = self.packed
        _, columns, width = packed.packing.dimensions(packed.shape)
        places = np.unravel_index(np.arange(self.row, self.row + self.num_rows), self.shape)
        begins = self.begin + sum(place * stride for place, stride in zip(places, self.strides, strict=True))
        begins = np.asarray(begins, np.int64) // ITEM_BYTES[packed.dtype]
        if packed.packing.is_transposed:  # [E, K, N]
            return begins // (columns * width) * columns + begins % columns
        return begins // width


def _are_finite(rows: Bits, fills: str, packing: Packing) -> bool:
    dtypes = {"scales": packing.scale_dtype, "offsets": "float32", "factors": packing.factors, "lows": packing.factors}
    dtype = dtypes.get(fills, "")
    return dtype not in FLOATS or is_finite(rows.view(np.uint8), dtype)


def _as_stored(rows: Bits, dtype: str) -> Bits:
    """Scales as the bits that are kept of them."""
    return from_float32(rows, dtype) if rows.dtype == np.float32 else rows


def chunks_of_bits(
    tensor: TensorSpec,
    piece: SourcePiece,
    part: StoredPart,
    target: Bits,
    begin: int,
    rows: tuple[int, int],
    limit: int,
    read: ReadSmall | None,
) -> Iterator[ChunkOfBits]:
    """
    Args:
        target: a strided view of the part of the tensor that the piece fills, as if in 16 bits, in the source's order.
        begin: where it begins in the tensor, in bytes.
        rows: of the source, that `target` takes.
        read: what `part.others` names.
    """
    packed = PackedTensor.of(tensor)
    assert packed is not None
    *lead, width = piece.source_shape
    columns = math.prod(lead)
    if target.ndim < 2 or target.shape[-1] != width or target.strides[-1] != packed.group_stride:
        raise cannot_be_read(tensor)
    layout, dtype = LAYOUTS[part.layout], piece.source_dtype
    line_bytes = layout.line_bytes(part, columns, width, dtype)
    others = read_others(part, read)
    locks = tuple(threading.Lock() for _ in range(_SHARES))
    unit, covers = layout.unit(part)
    units = max(1, limit // (line_bytes * unit))
    end = num_lines(part, columns, width)
    if len(lead) > 1:  # all of it
        rows = (0, columns)
    if not layout.is_turned:
        first_line, end = rows[0] // covers * unit, -(-rows[1] // covers) * unit
    else:
        first_line = 0
    for line in range(first_line, end, units * unit):
        count = min(units * unit, end - line)
        at = line // unit * covers  # row, or item of K
        low, high = rows if layout.is_turned else (max(at, rows[0]), min(at + count // unit * covers, rows[1]))
        yield ChunkOfBits(
            file=piece.file,
            offset=piece.offset + line * line_bytes,
            num_bytes=count * line_bytes,
            dtype=dtype,
            part=part,
            num_lines=count,
            num_rows=high - low,
            skipped=low - (0 if layout.is_turned else at),
            first=at if layout.is_turned else 0,
            begin=begin,
            row=low - rows[0],
            shape=target.shape[:-1],
            strides=target.strides[:-1],
            packed=packed,
            others=others,
            locks=locks,
            name=piece.source_name,
        )


def read_others(part: StoredPart, read: ReadSmall | None) -> tuple[Bits, ...]:
    """The bits of what `part.others` names."""
    assert read is not None or not part.others
    return tuple(np.frombuffer(read(other), bits_type(other.dtype)) for other in part.others)  # type: ignore[misc]


def cannot_be_read(tensor: TensorSpec) -> CheckpointError:
    return CheckpointError(
        f"{tensor.name}: the checkpoint has it in few bits, and other than row by row: use the unquantised model with "
        "`quantization`"
    )

"""Puts weights that are in few bits already, as compressed-tensors stores them, into the order of packing.py.

Values, scales and zeros are read apart, each in runs of rows: where a row goes does not depend on the others.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.packing import COLUMNS, num_blocks
from flexgen_lite.model.spec import ITEM_BYTES, SourcePiece, StoredPart, TensorSpec
from flexgen_lite.workers.loader.weight_cast import Bits, bits_type, copy_cast
from flexgen_lite.workers.loader.weight_packing import PackedTensor


@dataclass(frozen=True, slots=True)
class ChunkOfBits:
    """A run of file bytes that has `num_rows` rows of a weight, `skipped` behind the first that its first word has.

    Row r of them would begin at `begin` + r * `stride`, in bytes from the start of the tensor, were it in 16 bits.
    """

    file: int
    offset: int
    num_bytes: int
    dtype: str
    part: StoredPart
    num_rows: int
    skipped: int
    begin: int
    stride: int
    packed: PackedTensor

    def convert(self, bounce: mmap.mmap, bounce_offset: int, arena: mmap.mmap, slot_offset: int) -> None:
        """Put the chunk, whose bytes are at `bounce_offset`, in its place."""
        from flexgen_lite.workers.loader import order_kernels

        packing, part = self.packed.packing, self.part
        count, columns, width = packing.dimensions(self.packed.shape)
        values, scales, zeros = self.packed.parts(arena, slot_offset, count)
        rows = self._rows(columns, width)
        blocks = rows // columns * num_blocks(columns) + rows % columns // COLUMNS
        row_bytes = part.row_bytes(width, self.dtype)
        lines = np.ndarray((self.num_bytes // row_bytes, row_bytes), np.uint8, bounce, bounce_offset)
        if part.kind == "values":
            put, word, item = order_kernels.of_values(packing)
            steps = row_bytes // item().itemsize
            put(_words(lines, word), _places(blocks, rows % columns, steps), values.view(item))
            return
        places = _places(blocks, rows % columns, width // part.group)
        if part.kind == "scales":
            source = _words(lines, bits_type(self.dtype))
            cast = np.empty(source.shape, bits_type(packing.scale_dtype))
            copy_cast(source, self.dtype, cast, packing.scale_dtype)
            order_kernels.put_items(cast, places, scales)
        else:
            order_kernels.put_zeros(_words(lines, np.uint32), places, zeros, self.skipped, part.num_bits)

    def _rows(self, columns: int, width: int) -> Bits:
        """Their numbers, counted through all weights of the tensor."""
        packed = self.packed
        begins = (self.begin + np.arange(self.num_rows, dtype=np.int64) * self.stride) // ITEM_BYTES[packed.dtype]
        if packed.packing.is_transposed:  # [E, K, N]
            return begins // (columns * width) * columns + begins % columns
        return begins // width


def chunks_of_bits(
    tensor: TensorSpec,
    piece: SourcePiece,
    part: StoredPart,
    target: Bits,
    begin: int,
    rows: tuple[int, int],
    limit: int,
) -> Iterator[ChunkOfBits]:
    """
    Args:
        target: a strided view of the part of the tensor that the piece fills, as if in 16 bits, in the source's order.
        begin: where it begins in the tensor, in bytes.
        rows: of the source, that `target` takes.
    """
    packed = PackedTensor.of(tensor)
    assert packed is not None
    width = piece.source_shape[-1]
    if target.ndim != 2 or target.shape[1] != width or target.strides[1] != packed.group_stride:
        raise cannot_be_read(tensor)
    row_bytes = part.row_bytes(width, piece.source_dtype)
    step = max(1, limit // row_bytes) * part.rows
    first = rows[0] // part.rows * part.rows
    for start in range(first, rows[1], step):
        low, high = max(start, rows[0]), min(start + step, rows[1])
        lines = -(-(high - start) // part.rows)
        yield ChunkOfBits(
            file=piece.file,
            offset=piece.offset + start // part.rows * row_bytes,
            num_bytes=lines * row_bytes,
            dtype=piece.source_dtype,
            part=part,
            num_rows=high - low,
            skipped=low - start,
            begin=begin + (low - rows[0]) * target.strides[0],
            stride=target.strides[0],
            packed=packed,
        )


def cannot_be_read(tensor: TensorSpec) -> CheckpointError:
    return CheckpointError(
        f"{tensor.name}: the checkpoint has it in few bits, and other than row by row: use the unquantised model with "
        "`quantization`"
    )


def _words(lines: Bits, kind: type[np.unsignedinteger[Any]]) -> Bits:
    """The same bytes as larger words, in memory that these may lie in."""
    size = kind().itemsize
    if lines.__array_interface__["data"][0] % size:
        lines = lines.copy()
    return lines.view(kind)


def _places(blocks: Bits, columns: Bits, steps: int) -> Bits:
    """Where the first item of each row goes, in items; the next one goes COLUMNS further."""
    return np.asarray(blocks * (steps * COLUMNS) + columns % COLUMNS, dtype=np.int64)

"""How the pieces of a unit's converted tensors are read in bounded chunks and put in their places.

A piece says how its source becomes a part of a tensor. Turned round, that gives the part of the tensor as a
strided view in the order of the source, so any run of the source's rows can be put in place by itself. Only
where no such view exists (a reshape across transposed dimensions) the whole piece must be in memory at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexgen_lite.memory.arena import Memory
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.spec import ITEM_BYTES, SourcePiece, StoredPart, TensorSpec, UnitSpec
from flexgen_lite.workers.loader.lines import Lines
from flexgen_lite.workers.loader.stored_bits import (
    ChunkOfBits,
    NotFiniteError,
    ReadSmall,
    cannot_be_read,
    chunks_of_bits,
    read_others,
)
from flexgen_lite.workers.loader.stored_layouts import LAYOUTS
from flexgen_lite.workers.loader.weight_cast import Bits, bits_type, copy_cast
from flexgen_lite.workers.loader.weight_packing import PackedTensor
from flexgen_lite.workers.loader.whole_layouts import floats

BLOCK_BYTES = 4096
_TIMES = 8  # as much room as blocks of 4 bits take rows of float32
MAX_GAP_BYTES = 64 * 1024  # chunks closer together than this are read at once


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of file bytes and the strided part of a tensor that it fills.

    `target_offset` is from the start of the slot.
    """

    file: int
    offset: int
    num_bytes: int
    source_dtype: str
    source_shape: tuple[int, ...]
    views: tuple[tuple[str | int, ...], ...]
    target_dtype: str
    target_shape: tuple[int, ...]
    target_strides: tuple[int, ...]
    target_offset: int
    packed: PackedTensor | None = None  # offset and strides are then those that it would have in 16 bits
    part: StoredPart | None = None  # that it is, of rows that are stored otherwise than item by item
    row: int = 0  # of these, the first
    others: tuple[Bits, ...] = ()  # what `part.others` names
    name: str = ""  # of the source

    def convert(self, bounce: Memory, bounce_offset: int, arena: Memory, slot_offset: int) -> None:
        """Put the chunk, whose bytes are at `bounce_offset`, in its place."""
        source, source_dtype = self._source(bounce, bounce_offset)
        if self.packed is not None:
            part, place = apply_views(source, self.views), self.target_offset - self.packed.offset
            self.packed.fill(part, source_dtype, place, self.target_strides, arena, slot_offset)
            return
        target = np.ndarray(
            self.target_shape,
            bits_type(self.target_dtype),
            arena,
            slot_offset + self.target_offset,
            self.target_strides,
        )
        copy_cast(apply_views(source, self.views), source_dtype, target, self.target_dtype)

    def _source(self, bounce: Memory, bounce_offset: int) -> tuple[Bits, str]:
        """The items' bits, and what they are."""
        if self.part is None:
            return np.ndarray(self.source_shape, bits_type(self.source_dtype), bounce, bounce_offset), self.source_dtype
        count, width = math.prod(self.source_shape[:-1]), self.source_shape[-1]
        lines = np.ndarray((count, self.num_bytes // count), np.uint8, bounce, bounce_offset)
        try:
            rows = floats(Lines(lines, self.part, self.source_dtype, self.others, None, width, self.row))
        except NotFiniteError:
            raise NotFiniteError(self.name) from None
        return rows.view(np.uint32).reshape(self.source_shape), "float32"


AnyChunk = Chunk | ChunkOfBits


@dataclass(frozen=True, slots=True)
class Batch:
    """Chunks that are read at once: `num_bytes` at `offset` of the file, both multiples of 4096."""

    file: int
    offset: int
    num_bytes: int
    chunks: tuple[AnyChunk, ...]


def plan_batches(unit: UnitSpec, max_bytes: int, read: ReadSmall | None = None) -> list[Batch]:
    """Every converted tensor's bytes, in file order.

    A batch is larger than `max_bytes` only where a piece cannot be cut.

    Args:
        read: gives a few bytes of a file that are needed to read others.
    """
    limit = max_bytes - 2 * BLOCK_BYTES
    chunks = [
        chunk
        for index in unit.converted
        for piece in unit.tensors[index].pieces
        if piece.num_bytes
        for chunk in _chunks(unit.tensors[index], piece, limit, read)
    ]
    return list(_batches(chunks, max_bytes))


def apply_views(source: Bits, views: Iterable[tuple[str | int, ...]]) -> Bits:
    for kind, *values in views:
        numbers = [int(value) for value in values]
        if kind == "reshape":
            source = source.reshape(numbers)
        elif kind == "transpose":
            source = source.swapaxes(*numbers)
        elif kind == "slice":
            dim, start, stop = numbers
            source = source[(slice(None),) * dim + (slice(start, stop),)]
        else:
            raise ValueError(f"unknown view {kind}")
    return source


def _chunks(tensor: TensorSpec, piece: SourcePiece, limit: int, read: ReadSmall | None) -> Iterator[AnyChunk]:
    whole = np.lib.stride_tricks.as_strided(  # of the tensor's shape and strides, over one element
        np.empty(1, bits_type(tensor.dtype)), tensor.shape, _strides(tensor.shape, ITEM_BYTES[tensor.dtype])
    )
    base = _address(whole)
    # The ellipsis keeps it a view where the tensor has no dimensions.
    region: tuple[Any, ...] = (*(slice(start, stop) for start, stop in piece.region), ...)
    target = whole[region]
    packed = PackedTensor.of(tensor)
    others = () if piece.part is None or packed is not None else read_others(piece.part, read)

    def chunk(
        offset: int, num_bytes: int, shape: tuple[int, ...], views: tuple[tuple[str | int, ...], ...], part: Bits
    ) -> Chunk:
        if packed is not None and packed.group_axis(part.shape, part.strides) is None:
            raise CheckpointError(
                f"{tensor.name} cannot be quantised while it is loaded, as the checkpoint has it: name its layer in "
                "quantization_ignore"
            )
        return Chunk(
            file=piece.file,
            offset=offset,
            num_bytes=num_bytes,
            source_dtype=piece.source_dtype,
            source_shape=shape,
            views=views,
            target_dtype=tensor.dtype,
            target_shape=part.shape,
            target_strides=part.strides,
            target_offset=tensor.offset + _address(part) - base,
            packed=packed,
            part=piece.part,
            row=(offset - piece.offset) // _source_strides(piece)[-1] if piece.part is not None else 0,
            others=others,
            name=piece.source_name,
        )

    turned = _in_source_order(target, piece)
    if piece.part is not None and tensor.packing is not None:
        if turned is None or not _takes_rows(turned[1], piece.source_shape):
            raise cannot_be_read(tensor)
        target, (rows_taken, *_) = turned
        begin = _address(target) - base
        yield from chunks_of_bits(tensor, piece, piece.part, target, begin, rows_taken, limit, read)
        return
    if turned is None or (piece.part is not None and piece.part.layout == "whole"):
        yield chunk(piece.offset, piece.num_bytes, piece.source_shape, piece.views, target)
        return
    target, box = turned
    shape, strides, most = piece.source_shape or (1,), _source_strides(piece), limit
    if piece.part is not None:  # rows of float32 are made of them
        most = limit // _TIMES
        if len(shape) == 1:
            target, box, shape, strides = target[None], ((0, 1), *box), (1, *shape), (piece.num_bytes, *strides)
    # Dimension k is cut into runs of rows; the dimensions before it are gone through one index at a time.
    k = next(dim for dim in range(len(shape)) if strides[dim] <= most or (piece.part and dim == len(shape) - 2))
    rows = max(1, most // strides[k])
    if packed is not None and packed.group_axis(target.shape, target.strides) == k:  # whole groups
        rows = max(packed.packing.group, rows // packed.packing.group * packed.packing.group)
    inner = box[k + 1 :]
    views = tuple(
        ("slice", dim + 1, start, stop)
        for dim, (start, stop) in enumerate(inner)
        if (start, stop) != (0, shape[k + 1 + dim])
    )
    for lead in itertools.product(*(range(start, stop) for start, stop in box[:k])):
        for first in range(*box[k], rows):
            last = min(first + rows, box[k][1])
            offset = piece.offset + first * strides[k] + sum(i * s for i, s in zip(lead, strides, strict=False))
            place = tuple(index - start for index, (start, _) in zip(lead, box, strict=False))
            where: tuple[Any, ...] = (*place, slice(first - box[k][0], last - box[k][0]))
            part = target[where]
            yield chunk(offset, (last - first) * strides[k], (last - first, *shape[k + 1 :]), views, part)


def _takes_rows(box: tuple[tuple[int, int], ...], shape: tuple[int, ...]) -> bool:
    """Whether whole rows are taken: a run of them, or all where they are counted by several dimensions."""
    whole = tuple((0, size) for size in shape)
    return box == whole or (len(shape) == 2 and box[1:] == whole[1:])


def _source_strides(piece: SourcePiece) -> tuple[int, ...]:
    """Of its dimensions, in bytes; where items lie in blocks, that of the last is the line's."""
    shape, dtype = piece.source_shape or (1,), piece.source_dtype
    if piece.part is None:
        return _strides(shape, ITEM_BYTES[dtype])
    line_bytes = LAYOUTS[piece.part.layout].line_bytes(piece.part, math.prod(shape[:-1]), shape[-1], dtype)
    return (*_strides(shape[:-1], line_bytes), line_bytes)


def _in_source_order(target: Bits, piece: SourcePiece) -> tuple[Bits, tuple[tuple[int, int], ...]] | None:
    """The target with the source's dimensions, and which part of the source it takes (per dimension)."""
    shape = piece.source_shape or (1,)
    shapes = [shape]
    for view in piece.views:
        shapes.append(_shape_after(shapes[-1], view))
    box = tuple((0, size) for size in shape)
    if not piece.source_shape or not piece.views:
        target = target.reshape(shape, copy=False)
    for index in reversed(range(len(piece.views))):
        kind, *values = piece.views[index]
        numbers = [int(value) for value in values]
        if kind == "transpose":
            target = target.swapaxes(*numbers)
        elif kind == "reshape":
            try:
                target = target.reshape(shapes[index], copy=False)
            except ValueError:
                return None
        elif index == 0:
            dim, start, stop = numbers
            box = (*box[:dim], (start, stop), *box[dim + 1 :])
        else:
            return None
    return target, box


def _shape_after(shape: tuple[int, ...], view: tuple[str | int, ...]) -> tuple[int, ...]:
    kind, *values = view
    numbers = [int(value) for value in values]
    if kind == "reshape":
        return tuple(numbers)
    changed = list(shape)
    if kind == "transpose":
        changed[numbers[0]], changed[numbers[1]] = shape[numbers[1]], shape[numbers[0]]
    elif kind == "slice":
        changed[numbers[0]] = numbers[2] - numbers[1]
    else:
        raise ValueError(f"unknown view {kind}")
    return tuple(changed)


def _batches(chunks: list[AnyChunk], max_bytes: int) -> Iterator[Batch]:
    chunks.sort(key=lambda chunk: (chunk.file, chunk.offset))
    members: list[AnyChunk] = []
    start = end = 0
    for chunk in chunks:
        chunk_end = -(-(chunk.offset + chunk.num_bytes) // BLOCK_BYTES) * BLOCK_BYTES
        joins = (
            members
            and chunk.file == members[0].file
            and chunk.offset - end < MAX_GAP_BYTES
            and max(end, chunk_end) - start <= max_bytes
        )
        if joins:
            members.append(chunk)
            end = max(end, chunk_end)
            continue
        if members:
            yield Batch(members[0].file, start, end - start, tuple(members))
        members, start, end = [chunk], chunk.offset // BLOCK_BYTES * BLOCK_BYTES, chunk_end
    if members:
        yield Batch(members[0].file, start, end - start, tuple(members))


def _strides(shape: tuple[int, ...], item_bytes: int) -> tuple[int, ...]:
    return tuple(item_bytes * math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def _address(array: Bits) -> int:
    return int(array.__array_interface__["data"][0])

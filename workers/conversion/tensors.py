"""Tensors of a source copied or packed into a new file, a bounded part at a time."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator

import numpy as np

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.formats.compressed_tensors import SCALES, SHAPE, VALUES, ZEROS
from flexgen_lite.model.packing import COLUMNS, Packing, num_blocks
from flexgen_lite.model.spec import ITEM_BYTES
from flexgen_lite.workers.conversion.shards import Item
from flexgen_lite.workers.loader.weight_cast import Bits, bits_type
from flexgen_lite.workers.loader.weight_packing import PackedTensor

PART_BYTES = 4 << 20  # of the source, that a job takes; packing takes some three times as much memory

Job = Callable[[], int]


class NewFile:
    """A file that is being written: `offsets[name]` is where a tensor begins. From any thread."""

    def __init__(self, descriptor: int, offsets: dict[str, int]) -> None:
        self._descriptor, self._offsets = descriptor, offsets

    def write(self, name: str, start: int, data: bytes | bytearray | memoryview) -> None:
        """`data` from byte `start` of tensor `name` on."""
        left, place = memoryview(data), self._offsets[name] + start
        while left:
            done = os.pwrite(self._descriptor, left, place)
            left, place = left[done:], place + done


class Source:
    """The source's files, opened at first use."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        self._paths = paths
        self._open: dict[int, int] = {}

    def open(self, file: int) -> int:
        """Its descriptor."""
        if file not in self._open:
            self._open[file] = os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[file]

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, file: int, offset: int, num_bytes: int) -> bytearray:
        """Raises CheckpointError where they are not there."""
        data, done = bytearray(num_bytes), 0
        with memoryview(data) as target:
            while done < num_bytes:
                got = os.preadv(self._open[file], [target[done:]], offset + done)
                if not got:
                    raise CheckpointError(f"{self._paths[file]} was cut off while it was read: download it again")
                done += got
        os.posix_fadvise(self._open[file], offset, num_bytes, os.POSIX_FADV_DONTNEED)
        return data


def jobs(item: Item, source: Source, new: NewFile) -> Iterator[Job]:
    """What is to be done for a tensor, in any order; each tells how many bytes of the source it has read."""
    if item.packing is None:
        yield from _copies(item, source, new)
        return
    columns, width = item.source.shape
    new.write(item.layer + SHAPE, 0, np.array([columns, width], np.int64).tobytes())
    row_bytes = width * ITEM_BYTES[item.source.dtype]
    step = max(1, PART_BYTES // row_bytes // COLUMNS) * COLUMNS
    for start in range(0, columns, step):
        yield _packing(item, item.packing, start, min(start + step, columns), source, new)


def _copies(item: Item, source: Source, new: NewFile) -> Iterator[Job]:
    stored = item.source
    for start in range(0, stored.num_bytes, PART_BYTES):

        def copy(start: int = start) -> int:
            size = min(PART_BYTES, stored.num_bytes - start)
            new.write(stored.name, start, source.read(stored.file, stored.offset + start, size))
            return size

        yield copy


def _packing(item: Item, packing: Packing, first: int, last: int, source: Source, new: NewFile) -> Job:
    """Rows `first`, a multiple of COLUMNS, to `last`."""
    stored, width = item.source, item.source.shape[1]
    row_bytes = width * ITEM_BYTES[stored.dtype]

    def pack() -> int:
        data = source.read(stored.file, stored.offset + first * row_bytes, (last - first) * row_bytes)
        rows = np.frombuffer(data, bits_type(stored.dtype)).reshape(-1, width)
        values, scales, zeros = packed_rows(rows, stored.dtype, packing)
        new.write(item.layer + VALUES, first * values.nbytes // len(rows), values.tobytes())
        new.write(item.layer + SCALES, first * scales.nbytes // len(rows), scales.tobytes())
        if zeros is not None:
            words = first * packing.bits // 32
            new.write(item.layer + ZEROS, words * zeros.nbytes // len(zeros), zeros.tobytes())
        return len(data)

    return pack


def packed_rows(rows: Bits, dtype: str, packing: Packing) -> tuple[Bits, Bits, Bits | None]:
    """Values, scales and zeros of some rows of a weight, as compressed-tensors stores them: the loader's own, taken out
    of the order that it puts them into."""
    from flexgen_lite.workers.loader import order_kernels

    count, width = rows.shape
    packed = PackedTensor(packing, dtype, (count, width), 0)
    memory = mmap.mmap(-1, packing.num_bytes(packed.shape))
    packed.fill(rows, dtype, 0, rows.strides, memory, 0)
    values, scales, zeros = packed.parts(memory, 0, 1)[:3]
    numbers, steps = np.arange(count, dtype=np.int64), width * packing.bits // 64
    places = numbers // COLUMNS * (steps * COLUMNS) + numbers % COLUMNS
    taken = np.empty((count, steps), np.uint64)
    take = order_kernels.take_4 if packing.bits == 4 else order_kernels.take_8
    take(values.view(np.uint64), places, taken)
    return taken, _by_row(scales, count), _joined(_by_row(zeros, count), packing.bits) if packing.has_zeros else None


def _by_row(blocks: Bits, count: int) -> Bits:
    return (
        blocks.reshape(num_blocks(count), -1, COLUMNS).swapaxes(1, 2).reshape(num_blocks(count) * COLUMNS, -1)[:count]
    )


def _joined(zeros: Bits, bits: int) -> Bits:
    """Those of 32 / `bits` rows in a word."""
    items = 32 // bits
    padded = np.zeros((-(-len(zeros) // items) * items, zeros.shape[1]), np.uint32)
    padded[: len(zeros)] = zeros
    shifts = np.arange(items, dtype=np.uint32)[:, None] * np.uint32(bits)
    words: Bits = np.bitwise_or.reduce(padded.reshape(-1, items, zeros.shape[1]) << shifts, axis=1)
    return words

"""The loader's work: fill a weight slot with a unit's tensors."""

from __future__ import annotations

import mmap
import queue
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait

from flexgen_lite.memory.arena import Memory, make_buffer, take_large_pages
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.wire.worker_messages import AttachLoader, Load
from flexgen_lite.workers.loader.bounce_plan import Batch, plan_batches
from flexgen_lite.workers.loader.checksums import Checksums, cache_folder
from flexgen_lite.workers.loader.disk_reader import READ_BYTES, DiskReader, ReadOrder, split_order
from flexgen_lite.workers.loader.dummy_weights import DummyWeights
from flexgen_lite.workers.loader.stored_bits import NotFiniteError

BOUNCE_BYTES = 64 << 20  # of all bounce buffers together, but for a piece that must be converted in one go
MAX_CHUNK_BYTES = 4 << 20

Task = Callable[[], int]


class LoaderState:
    """Loads units into the slots of `arena`.

    Each of `attach.threads` threads takes a read, and where the bytes need conversion converts them before
    the next one: while one thread converts, the others read. Peak memory besides the arena: one chunk of at
    most 4 MiB per thread.
    """

    def __init__(self, attach: AttachLoader, arena: Memory) -> None:
        if attach.load_format not in ("auto", "dummy"):
            raise ValueError(f"load_format {attach.load_format!r}: it must be auto or dummy")
        if any(offset % mmap.PAGESIZE for offset in attach.slot_offsets):
            raise ValueError(f"slot offsets must be multiples of {mmap.PAGESIZE}: {attach.slot_offsets}")
        self._attach = attach
        self._arena = arena
        self._bytes = memoryview(arena)
        self._pool = ThreadPoolExecutor(attach.threads, thread_name_prefix="reader")
        self._checksums = Checksums(attach.files, attach.stamps, attach.verify, cache_folder())
        self._reader = DiskReader(attach.files, attach.stamps, self._checksums)
        self._dummy = DummyWeights() if attach.load_format == "dummy" else None
        self._batches: dict[int, list[Batch]] = {}
        self._chunk_bytes = min(MAX_CHUNK_BYTES, BOUNCE_BYTES // attach.threads // mmap.PAGESIZE * mmap.PAGESIZE)
        self._bounces: queue.SimpleQueue[Memory] = queue.SimpleQueue()
        self._num_bounces = 0
        self._fillings: Counter[int] = Counter()  # of each slot

    def close(self) -> None:
        """Stop the threads and let go of the files and the arena."""
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()
        self._bytes.release()

    def load(self, order: Load) -> int:
        """Fill slot `order.slot` with unit `order.unit`; the number of bytes read. Raises CheckpointError."""
        unit = self._attach.units[order.unit]
        slot_offset = self._attach.slot_offsets[order.slot]
        if slot_offset + unit.num_bytes > len(self._arena):
            raise ValueError(
                f"unit {order.unit} ({unit.num_bytes} bytes) does not fit the arena at slot "
                f"{order.slot} ({slot_offset})"
            )
        if self._fillings[order.slot] == 1:  # those that are filled once are not worth it
            take_large_pages(self._arena, slot_offset, unit.num_bytes)
        self._fillings[order.slot] += 1
        if self._dummy is not None:
            return self._run(self._fill_tasks(self._dummy, order.unit, slot_offset))
        batches = self._batches.get(order.unit)
        if batches is None:
            batches = self._batches[order.unit] = plan_batches(unit, self._chunk_bytes, self._reader.read_small)
        files = {extent.file for extent in unit.extents} | {batch.file for batch in batches}
        small = [batch for batch in batches if batch.num_bytes <= self._chunk_bytes]
        self._reader.check_unchanged(files)
        self._make_bounces(min(len(small), self._attach.threads))
        num_bytes = self._run([*self._read_tasks(order.unit, slot_offset), *self._convert_tasks(small, slot_offset)])
        for batch in batches:
            if batch.num_bytes > self._chunk_bytes:
                num_bytes += self._convert_whole(batch, slot_offset)
        self._reader.check_unchanged(files)
        self._checksums.save()
        return num_bytes

    def _run(self, tasks: Iterable[Task]) -> int:
        futures: list[Future[int]] = [self._pool.submit(task) for task in tasks]
        _, unfinished = wait(futures, return_when=FIRST_EXCEPTION)
        if unfinished:
            for future in unfinished:
                future.cancel()
            wait(futures)
        return sum(future.result() for future in sorted(futures, key=lambda future: future.cancelled()))

    def _read_tasks(self, unit: int, slot_offset: int) -> list[Task]:
        tasks: list[Task] = []
        for extent in self._attach.units[unit].extents:
            start = slot_offset + extent.slot_offset
            target = self._bytes[start : start + extent.num_bytes]
            whole = ReadOrder(extent.file, extent.file_offset, extent.num_bytes, target)
            tasks.extend(_bind(self._reader.read, part) for part in split_order(whole))
        return tasks

    def _convert_tasks(self, batches: Iterable[Batch], slot_offset: int) -> list[Task]:
        def task(batch: Batch) -> Task:
            return lambda: self._read_and_convert(batch, slot_offset)

        return [task(batch) for batch in batches]

    def _read_and_convert(self, batch: Batch, slot_offset: int) -> int:
        bounce = self._bounces.get()
        try:
            with memoryview(bounce) as target:
                read = self._reader.read(ReadOrder(batch.file, batch.offset, batch.num_bytes, target))
            self._convert(batch, bounce, slot_offset)
            return read
        finally:
            self._bounces.put(bounce)

    def _convert_whole(self, batch: Batch, slot_offset: int) -> int:
        """A piece that has to be in memory all at once, in a buffer of its own."""
        bounce = make_buffer(batch.num_bytes)
        orders = split_order(ReadOrder(batch.file, batch.offset, batch.num_bytes, bounce), READ_BYTES)
        read = self._run([_bind(self._reader.read, order) for order in orders])
        self._convert(batch, bounce, slot_offset)
        return read

    def _convert(self, batch: Batch, bounce: Memory, slot_offset: int) -> None:
        for chunk in batch.chunks:
            try:
                chunk.convert(bounce, chunk.offset - batch.offset, self._arena, slot_offset)
            except NotFiniteError as error:
                raise CheckpointError(
                    f"{self._attach.files[batch.file]}: {error} has scales that are infinite or no numbers: download "
                    "the model again"
                ) from None

    def _make_bounces(self, count: int) -> None:
        while self._num_bounces < count:
            self._bounces.put(make_buffer(self._chunk_bytes))
            self._num_bounces += 1

    def _fill_tasks(self, dummy: DummyWeights, unit: int, slot_offset: int) -> list[Task]:
        return [
            lambda fill=fill: dummy.write(fill, self._arena, slot_offset)  # type: ignore[misc]
            for fill in dummy.fills(unit, self._attach.units[unit])
        ]


def _bind(read: Callable[[ReadOrder], int], order: ReadOrder) -> Task:
    return lambda: read(order)

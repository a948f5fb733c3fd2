"""The schedule run with lane speeds instead of workers: when each pass of a job would begin and end. Pure logic.

Orders are the schedule's own (zigzag.py, slot_ring.py), and which segment runs next is SegmentQueue's to say, as in the
compute worker. Each lane does one thing at a time, in the order in which it is told; attention workers are a lane each.
They take from each other what Rates say. KV that is parked and fetched goes beside the weights, one order after the
other, from one pass into the next.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from flexgen_lite.cost.pass_work import MicroBatchWork, Work
from flexgen_lite.cost.rates import Rates
from flexgen_lite.queue.micro_batch import MicroBatch
from flexgen_lite.schedule.segment_queue import SegmentQueue
from flexgen_lite.schedule.zigzag import LoadUnit, Order, RunColumns, Schedule, UploadUnit
from flexgen_lite.wire.kv_on_disk import FetchKv, ParkKv

DISK, UPLOAD, COMPUTE = "disk", "host-to-device", "compute"
ATTENTION = "attention"  # with the number of the worker behind it
KV = "KV on disk"  # of the same disk: what it works is the disk's
KV_SHARE = 0.2  # of the disk, beside weights: one of five reads that are on their way at a time
SEEN = 2  # passes of a kind that are run through event by event


@dataclass(slots=True)
class _Task:
    left: float  # seconds, alone
    what: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PassTime:
    """Seconds of a pass, and of those in which each lane was busy."""

    seconds: float
    busy: dict[str, float] = field(default_factory=dict)


def _kind(begin: float, batches: Sequence[MicroBatchWork]) -> tuple[int, ...]:
    """The same for passes whose parts take the same time, but for some per cent."""
    kind = [_step(begin, 0.2)]
    for batch in batches:
        attention = sum(sum(parts.values()) for parts in batch.attention)
        kind += [len(batch.workers), _step(sum(batch.segments), 0.01), _step(attention, 0.05)]
    return tuple(kind)


def _step(seconds: float, width: float) -> int:
    return round(math.log(max(seconds, 1e-9)) / width)


class Simulator:
    """Passes one after the other; weights are on their way from one into the next.

    Args:
        credit: segments that the device takes at a time.
    """

    def __init__(self, schedule: Schedule, work: Work, rates: Rates, num_workers: int, credit: int = 1) -> None:
        self._schedule, self._work, self._rates, self._credit = schedule, work, rates, credit
        self._lanes: dict[str, _Task | None] = {DISK: None, UPLOAD: None, COMPUTE: None}
        self._lanes[KV] = None
        self._queues: dict[str, deque[_Task]] = {DISK: deque(), UPLOAD: deque(), KV: deque()}
        self._moves: dict[int, ParkKv | FetchKv] = {}  # that are on their way, by ticket
        self._moved: list[ParkKv | FetchKv] = []
        for worker in range(num_workers):
            self._lanes[f"{ATTENTION} {worker}"] = None
            self._queues[f"{ATTENTION} {worker}"] = deque()
        self._batches: list[MicroBatchWork] = []
        self._segments = SegmentQueue((), credit)
        self._left: set[tuple[int, int]] = set()  # segments whose first part has run
        self._ended = True
        self._alike: dict[tuple[int, ...], list[PassTime]] = {}
        self._orders(schedule.start())

    def load_all(self) -> float:
        """Seconds until everything that can be loaded before the first pass is there."""
        seconds = 0.0
        while any(self._lanes.values()):
            seconds += self._advance({})
        return seconds

    def run(self, micro_batches: Sequence[MicroBatch]) -> PassTime:
        """The next pass; the third of a kind is as the second, but for those beside which KV is moved."""
        begin = self._work.begin(micro_batches)
        batches = self._work.of_pass(micro_batches)
        if self._moves:
            return self._run(begin, batches)
        times = self._alike.setdefault(_kind(begin, batches), [])
        if len(times) < SEEN:
            times.append(self._run(begin, batches))
        return times[-1]

    def move(self, orders: Sequence[ParkKv | FetchKv]) -> None:
        """They are on their way, behind those that were before."""
        for order in orders:
            self._moves[order.ticket] = order
            self._give(KV, self._work.move(len(order.slots)), (order.ticket,))

    def take_moved(self) -> list[ParkKv | FetchKv]:
        """Those that have been carried out since the last time."""
        moved, self._moved = self._moved, []
        return moved

    def wait_for_move(self) -> PassTime:
        """Until the next of them is: nothing else is to be done."""
        assert self._moves, "nothing is on its way"
        seconds, busy = 0.0, dict[str, float]()
        while not self._moved:
            seconds += self._advance(busy)
        return PassTime(seconds, busy)

    def _run(self, begin: float, batches: list[MicroBatchWork]) -> PassTime:
        busy: dict[str, float] = {}
        seconds = self._wait(begin, busy)
        self._batches = batches
        self._segments = SegmentQueue([len(batch.workers) for batch in self._batches], self._credit)
        self._ended = False
        self._orders(self._schedule.begin_pass([batch.workers for batch in self._batches]))
        self._start_segment()
        while not self._schedule.pass_done:
            assert any(self._lanes.values()), f"nothing goes on: {self._schedule.standing()}"
            seconds += self._advance(busy)
        self._ended = True
        attention = [busy.pop(lane) for lane in list(busy) if lane.startswith(ATTENTION)]
        return PassTime(seconds, busy | {ATTENTION: max(attention, default=0.0)})

    def _wait(self, seconds: float, busy: dict[str, float]) -> float:
        """Time in which only the weights go on."""
        left = seconds
        while left > 0:
            running = [task.left / self._speed(lane) for lane, task in self._lanes.items() if task]
            step = min([left, *running])
            self._advance(busy, step)
            left -= step
        return seconds

    def _advance(self, busy: dict[str, float], most: float = float("inf")) -> float:
        """To the next end of a task, or at most so many seconds on."""
        speeds = {lane: self._speed(lane) for lane, task in self._lanes.items() if task is not None}
        step = min([most, *(self._task(lane).left / speed for lane, speed in speeds.items())])
        done = []
        for lane, speed in speeds.items():
            task = self._task(lane)
            task.left -= step * speed
            if lane != KV or DISK not in speeds:
                name = DISK if lane == KV else lane
                busy[name] = busy.get(name, 0.0) + step
            if task.left <= 1e-12:
                done.append((lane, task))
        for lane, task in done:
            self._lanes[lane] = None
            self._next(lane)
            self._has_ended(lane, task.what)
        return step

    def _task(self, lane: str) -> _Task:
        task = self._lanes[lane]
        assert task is not None
        return task

    def _speed(self, lane: str) -> float:
        """Share of what it would have alone."""
        lanes = self._lanes
        if lane in (DISK, KV):
            others = any(task for name, task in lanes.items() if name not in (DISK, KV, UPLOAD))
            kept = KV_SHARE if lane == KV else 1 - KV_SHARE
            return (self._rates.reads_beside_compute if others else 1.0) * (kept if lanes[DISK] and lanes[KV] else 1.0)
        if lane == UPLOAD:
            return 1.0
        reads = lanes[DISK] or lanes[KV]
        if lane == COMPUTE:
            attends = any(task for name, task in lanes.items() if name.startswith(ATTENTION))
            beside = self._batches[self._task(COMPUTE).what[1]].beside_disk if reads else 1.0
            return beside * (self._rates.computes_beside_attention if attends else 1.0)
        beside = self._rates.attends_beside_disk if reads else 1.0
        return beside * (self._rates.attends_beside_compute if lanes[COMPUTE] else 1.0)

    # ------------------------------------------------------------------------------------------------ what ended

    def _has_ended(self, lane: str, what: tuple[int, ...]) -> None:
        schedule = self._schedule
        if lane == DISK:
            self._orders(schedule.loaded(what[0]))
        elif lane == UPLOAD:
            self._orders(schedule.uploaded(what[0]))
        elif lane == KV:
            self._moved.append(self._moves.pop(what[0]))
        elif lane == COMPUTE:
            self._segment_ended(*what)
        else:
            column, micro_batch, worker = what
            schedule.attended(column, micro_batch, worker)
            self._segments.attended(column, micro_batch)
        if not self._ended:
            self._start_segment()

    def _segment_ended(self, column: int, micro_batch: int, left_only: int) -> None:
        self._segments.done()
        if left_only:
            self._orders(self._schedule.column_left(column, micro_batch))
            return
        batch = self._batches[micro_batch]
        if column < self._schedule.num_columns:
            for worker in batch.workers:
                if column in self._schedule.stops:
                    self._segments.attended(column, micro_batch)
                else:
                    self._give(f"{ATTENTION} {worker}", batch.attention[column][worker], (column, micro_batch, worker))
        self._orders(self._schedule.segment_done(column, micro_batch))

    def _start_segment(self) -> None:
        if self._lanes[COMPUTE] is not None:
            return
        segment = self._segments.take()
        if segment is None:
            return
        column, micro_batch, slot = segment
        batch, key = self._batches[micro_batch], (column, micro_batch)
        seconds, behind = batch.segments[column], batch.behind[column]
        if slot is None:
            seconds *= behind
            self._left.add(key)
        elif key in self._left:
            seconds *= 1 - behind
            self._left.remove(key)
        self._lanes[COMPUTE] = _Task(max(seconds, 1e-9), (column, micro_batch, int(slot is None)))

    def _orders(self, orders: Sequence[Order]) -> None:
        for order in orders:
            match order:
                case LoadUnit():
                    self._give(DISK, self._work.load(order.unit), (order.unit,))
                case UploadUnit():
                    self._give(UPLOAD, self._work.upload(order.unit), (order.unit,))
                case RunColumns():
                    for index, slot in enumerate(order.slots):
                        for micro_batch in range(len(self._batches)):
                            self._segments.grant(order.column + index, micro_batch, slot)

    def _give(self, lane: str, seconds: float, what: tuple[int, ...]) -> None:
        self._queues[lane].append(_Task(max(seconds, 1e-9), what))
        self._next(lane)

    def _next(self, lane: str) -> None:
        if lane != COMPUTE and self._lanes[lane] is None and self._queues[lane]:
            self._lanes[lane] = self._queues[lane].popleft()

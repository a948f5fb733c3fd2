"""The zig-zag order under every order of events: nothing runs before what it needs, everything runs once."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from hypothesis import assume, given
from hypothesis import strategies as st

from flexgen_lite.plan.placement import spread_evenly
from flexgen_lite.schedule.segment_queue import SegmentQueue
from flexgen_lite.schedule.slot_ring import SlotRing
from flexgen_lite.schedule.zigzag import LoadUnit, Order, RunColumns, Schedule, UploadUnit


class Machine:
    """Carries out orders in a random order and checks, at each, that what it reads is there and stays there.

    The compute worker's queue decides which segment runs; reports reach the schedule late, in order per worker.

    Args:
        calls: of attention, of each layer; stops among them.
        stops: columns that are.
        beside: layers that do not stay on the device have a unit of their own in main memory besides.
    """

    def __init__(
        self,
        calls: list[int],
        resident: int,
        slots: int,
        device_slots: int | None,
        credit: int,
        seed: int,
        device_alone: bool = False,
        stops: frozenset[int] = frozenset(),
        beside: bool = False,
    ) -> None:
        self.num_layers = num_layers = len(calls)
        self.layers = [layer for layer, count in enumerate(calls) for _ in range(count)]  # of the columns
        self.stops, self.credit = stops, credit
        self.random = random.Random(seed)
        layers = spread_evenly(resident, num_layers)
        streamed = [layer for layer in range(num_layers) if layer not in layers]
        first_ring, last = len(layers), len(layers) + slots
        pinned = {num_layers: last} | {layer: slot for slot, layer in enumerate(layers)}
        device, once, rest = None, frozenset[int](), list[int]()
        if device_slots is not None:
            candidates = streamed if device_alone else layers
            count = device_slots if device_slots == num_layers else device_slots - 2
            stay = {layer: slot for slot, layer in enumerate(candidates[: max(0, count)])}
            once = frozenset(stay) if device_alone else once
            rest = [layer for layer in range(num_layers) if layer not in stay]
            device = SlotRing({num_layers: device_slots} | stay, rest, range(len(stay), device_slots))
        self.staged = device is not None
        self.beside = {layer: num_layers + 1 + n for n, layer in enumerate(rest)} if beside and self.staged else {}
        pinned |= {unit: last + n for n, unit in enumerate(self.beside.values(), start=1)}
        host = SlotRing(pinned, streamed, range(first_ring, last), once)
        self.schedule = Schedule(self.layers, host, device, stops, self.beside)
        self.host: dict[int, int] = {}  # slot -> unit
        self.device: dict[int, int] = {}
        self.loads: Counter[int] = Counter()
        self.loading: list[LoadUnit] = []  # in order: one loader
        self.uploading: list[UploadUnit] = []
        self.queue = SegmentQueue((), credit)
        self.segments: list[tuple[int, int, int | None]] = []  # running: column, micro-batch, slot
        self.left: set[tuple[int, int]] = set()  # columns that micro-batches came to without their layer
        self.ended: list[tuple[int, int, bool]] = []  # not reported yet; whether it only left
        self.attending: list[tuple[int, int, int]] = []  # column, micro-batch, worker
        self.attended: list[tuple[int, int, int]] = []  # not reported yet
        self.take(self.schedule.start())

    def take(self, orders: list[Order]) -> None:
        for order in orders:
            match order:
                case LoadUnit():
                    busy = {o.slot for o in self.uploading}
                    busy |= set() if self.staged else {slot for _, _, slot in self.segments}
                    assert order.slot not in busy, "a slot is overwritten while it is read"
                    self.host.pop(order.slot, None)
                    self.loading.append(order)
                    self.loads[order.unit] += 1
                case UploadUnit():
                    assert self.host[order.slot] == order.unit
                    assert order.device_slot not in {slot for _, _, slot in self.segments}
                    self.device.pop(order.device_slot, None)
                    self.uploading.append(order)
                case RunColumns():
                    for column, slot in enumerate(order.slots, start=order.column):
                        for k in range(self.width):
                            self.queue.grant(column, k, slot)

    def check_segment(self, column: int, k: int, slot: int | None) -> None:
        """The layers of the column and of the one before, whose end the segment computes, are at hand, as far as they
        are needed."""
        units = set((self.device if self.staged else self.host).values())
        assert self.num_layers in units
        if column < len(self.layers) and slot is not None:
            layer = self.layers[column]
            assert (self.device if self.staged else self.host)[slot] == layer
            assert layer not in self.beside or self.beside[layer] in self.host.values()
        if column > 0 and (column, k) not in self.left:
            assert self.layers[column - 1] in units, "the layer behind the attention is gone"

    def abandon(self, compute_lost: bool) -> None:
        """A worker is lost in the middle of a pass: what is on its way comes to its end, and the pass to none."""
        self.schedule.suspend()
        self.segments, self.ended, self.attending, self.attended = [], [], [], []
        while self.loading or (self.uploading and not compute_lost):
            if self.loading:
                load = self.loading.pop(0)
                self.host[load.slot] = load.unit
                assert self.schedule.loaded(load.unit) == []
            else:
                assert self.schedule.uploaded(self.uploading.pop(0).unit) == []
        self.uploading = []
        self.device.clear()
        self.take(self.schedule.abandon_pass())

    def run_pass(self, parts: list[tuple[int, ...]], num_events: int | None = None) -> bool:
        """False where `num_events` were carried out before its end."""
        ran: Counter[tuple[int, int]] = Counter()
        attended: Counter[tuple[int, int, int]] = Counter()
        self.width = len(parts)
        self.left.clear()
        self.queue = SegmentQueue([len(workers) for workers in parts], self.credit)
        self.take(self.schedule.begin_pass(parts))
        for done in itertools.count():
            if self.schedule.pass_done:
                break
            if done == num_events:
                return False
            while segment := self.queue.take():
                self.check_segment(*segment)
                self.segments.append(segment)
            assert len(self.segments) <= self.credit
            lists = ("loading", "uploading", "segments", "attending", "ended", "attended")
            choices = [name for name in lists if getattr(self, name)]
            if not self.ended and not self.attended:
                workers = frozenset(worker for _, _, worker in self.attending)
                assert self.schedule.waits_for() == (bool(self.segments), workers)
            assert choices, f"deadlock: {self.schedule.standing()}"
            match self.random.choice(choices):
                case "loading":
                    load = self.loading.pop(0)
                    self.host[load.slot] = load.unit
                    self.take(self.schedule.loaded(load.unit))
                case "uploading":
                    upload = self.uploading.pop(0)
                    assert self.host[upload.slot] == upload.unit, "the host slot was overwritten during the copy"
                    self.device[upload.device_slot] = upload.unit
                    self.take(self.schedule.uploaded(upload.unit))
                case "segments":
                    column, k, slot = self.segments.pop(0)
                    self.check_segment(column, k, slot)
                    if column > 0 and column - 1 not in self.stops:
                        assert all(attended[column - 1, k, worker] == 1 for worker in parts[k])
                    self.queue.done()
                    self.ended.append((column, k, slot is None))
                    if slot is None:
                        assert (column, k) not in self.left and ran[column, k] == 0
                        assert column in map(self.layers.index, self.layers), "no entry of a layer to stop at"
                        self.left.add((column, k))
                        continue
                    ran[column, k] += 1
                    if column in self.stops:
                        for _ in parts[k]:
                            self.queue.attended(column, k)
                    elif column < len(self.layers):
                        self.attending.extend((column, k, worker) for worker in parts[k])
                case "attending":
                    column, k, worker = self.attending.pop(self.random.randrange(len(self.attending)))
                    assert ran[column, k] == 1
                    attended[column, k, worker] += 1
                    self.queue.attended(column, k)
                    self.attended.append((column, k, worker))
                case "ended":
                    column, k, left_only = self.ended.pop(0)
                    report = self.schedule.column_left if left_only else self.schedule.segment_done
                    self.take(report(column, k))
                case "attended":
                    self.schedule.attended(*self.attended.pop(0))
        self.attended.clear()  # reports of a pass that is over
        expected = {(column, k): 1 for column in range(len(self.layers) + 1) for k in range(len(parts))}
        assert ran == expected, "every (column, micro-batch) exactly once"
        return True


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    calls = draw(st.lists(st.sampled_from((1, 1, 1, 2, 3)), min_size=1, max_size=9))
    num_layers = len(calls)
    resident = draw(st.integers(0, num_layers))
    streamed = num_layers - resident
    slots = draw(st.integers(min(2, streamed), max(2, streamed))) if streamed else 0
    slots = min(slots, streamed)
    device_slots = draw(st.none() | st.integers(min(2, num_layers), num_layers))
    credit, seed, device_alone = draw(st.integers(1, 2)), draw(st.integers(0, 2**32)), draw(st.booleans())
    stops = draw(st.just(frozenset()) | st.frozensets(st.integers(0, sum(calls) - 1)))
    return Machine(calls, resident, slots, device_slots, credit, seed, device_alone, stops, draw(st.booleans()))


PASSES = st.lists(
    st.lists(st.sets(st.integers(0, 2), min_size=1).map(lambda s: tuple(sorted(s))), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@given(machines(), PASSES)
def test_every_pass_runs_in_order_and_ends(machine: Machine, passes: list[list[tuple[int, ...]]]) -> None:
    for parts in passes:
        machine.run_pass(parts)


@given(machines(), PASSES, st.lists(st.tuples(st.integers(0, 120), st.booleans()), max_size=4))
def test_a_pass_that_is_given_up_can_be_begun_again(
    machine: Machine, passes: list[list[tuple[int, ...]]], losses: list[tuple[int, bool]]
) -> None:
    for parts in passes:
        while losses:
            num_events, compute_lost = losses.pop()
            if machine.run_pass(parts, num_events):
                break
            machine.abandon(compute_lost)
        machine.run_pass(parts)


def test_layers_that_stay_on_the_device_are_loaded_once() -> None:
    machine = Machine([1] * 8, 2, 2, 5, 1, 0, device_alone=True)
    machine.run_pass([(0,), (0,)])
    machine.loads.clear()
    for _ in range(3):
        machine.run_pass([(0,), (0,)])
    assert set(machine.loads) == {4, 5, 7}, "of the six that are not in RAM, the first three stay on the device"


@given(machines())
def test_the_loader_runs_ahead_into_the_next_pass(machine: Machine) -> None:
    """Once a pass is over, every slot is asked to be filled again: the disk does not wait for the next pass."""
    machine.run_pass([(0,), (0,)])
    while machine.loading or machine.uploading:
        if machine.uploading:
            upload = machine.uploading.pop(0)
            machine.device[upload.device_slot] = upload.unit
            machine.take(machine.schedule.uploaded(upload.unit))
        if machine.loading:
            load = machine.loading.pop(0)
            machine.host[load.slot] = load.unit
            machine.take(machine.schedule.loaded(load.unit))
    needed = machine.device if machine.staged else machine.host
    assert 0 in needed.values()


def test_what_stays_beside_the_device_is_loaded_once() -> None:
    machine = Machine([1] * 5, 0, 2, 2, 1, 0, beside=True)
    for _ in range(4):
        machine.run_pass([(0,), (0,)])
    machine.abandon(compute_lost=True)
    machine.run_pass([(0,), (0,)])
    assert {unit: machine.loads[unit] for unit in machine.loads if unit > 4} == dict.fromkeys(range(5, 11), 1)
    assert all(machine.loads[layer] > 4 for layer in range(5))


def test_columns_come_before_rows() -> None:
    """All micro-batches of a column before any of the next, when nothing is late."""
    queue, seen = SegmentQueue([1, 1, 1], 1), []
    for column in range(3):
        for k in (2, 0, 1):
            queue.grant(column, k, column)
    while (segment := queue.take()) and segment[2] is not None:
        column, k, _ = segment
        seen.append((column, k))
        queue.done()
        queue.attended(column, k)
    assert seen == [(column, k) for column in range(3) for k in range(3)]


@given(machines(), PASSES)
def test_who_is_waited_for_is_named(machine: Machine, passes: list[list[tuple[int, ...]]]) -> None:
    """Once everything that was done is reported, exactly the workers with something to do are waited for."""
    schedule, queue = machine.schedule, machine.queue
    assume(0 not in machine.stops)
    while machine.loading or machine.uploading:
        if machine.loading:
            load = machine.loading.pop(0)
            machine.host[load.slot] = load.unit
            machine.take(schedule.loaded(load.unit))
        elif machine.uploading:
            upload = machine.uploading.pop(0)
            machine.device[upload.device_slot] = upload.unit
            machine.take(schedule.uploaded(upload.unit))
    parts = passes[0]
    machine.width, machine.queue = len(parts), SegmentQueue([len(workers) for workers in parts], 1)
    queue = machine.queue
    machine.take(schedule.begin_pass(parts))
    assert schedule.waits_for() == (True, frozenset())
    column, k, slot = queue.take() or (-1, -1, None)
    assert slot is not None
    queue.done()
    machine.take(schedule.segment_done(column, k))
    assert schedule.waits_for() == (len(parts) > 1, frozenset(parts[k]))
    for worker in parts[k]:
        schedule.attended(column, k, worker)
    assert not schedule.waits_for()[1]


@given(st.integers(1, 100).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_resident_layers_are_spread_evenly(sizes: tuple[int, int]) -> None:
    count, total = sizes
    layers = spread_evenly(count, total)
    assert len(layers) == count
    gaps = [b - a for a, b in itertools.pairwise(layers)]
    assert not gaps or max(gaps) - min(gaps) <= 1

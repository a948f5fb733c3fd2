"""The zig-zag order under every order of events: nothing runs before what it needs, everything runs once."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.plan import spread_evenly
from flexgen_lite.schedule import LoadUnit, Order, RunAttention, RunSegment, Schedule, UploadUnit
from flexgen_lite.slot_ring import SlotRing


class Machine:
    """Carries out orders in a random order and checks, at each, that what it reads is there and stays there."""

    def __init__(self, num_layers: int, resident: int, slots: int, device_slots: int | None, seed: int) -> None:
        self.num_layers = num_layers
        self.random = random.Random(seed)
        layers = spread_evenly(resident, num_layers)
        streamed = [layer for layer in range(num_layers) if layer not in layers]
        first_ring, last = len(layers), len(layers) + slots
        pinned = {num_layers: last} | {layer: slot for slot, layer in enumerate(layers)}
        host = SlotRing(pinned, streamed, range(first_ring, last))
        device = None
        if device_slots is not None:
            device = SlotRing({num_layers: device_slots}, range(num_layers), range(device_slots))
        self.staged = device is not None
        self.schedule = Schedule(num_layers, host, device)
        self.host: dict[int, int] = {}  # slot -> unit
        self.device: dict[int, int] = {}
        self.loading: list[LoadUnit] = []  # in order: one loader
        self.uploading: list[UploadUnit] = []
        self.segments: list[RunSegment] = []
        self.attending: list[tuple[RunAttention, int]] = []
        self.take(self.schedule.start())

    def take(self, orders: list[Order]) -> None:
        for order in orders:
            match order:
                case LoadUnit():
                    busy = {o.slot for o in self.uploading} | (
                        {o.slot for o in self.segments} if not self.staged else set()
                    )
                    assert order.slot not in busy, "a slot is overwritten while it is read"
                    self.host.pop(order.slot, None)
                    self.loading.append(order)
                case UploadUnit():
                    assert self.host[order.slot] == order.unit
                    assert order.device_slot not in {o.slot for o in self.segments}
                    self.device.pop(order.device_slot, None)
                    self.uploading.append(order)
                case RunSegment():
                    self.check_segment(order)
                    self.segments.append(order)
                    assert len(self.segments) <= 2
                case RunAttention():
                    self.attending.extend((order, worker) for worker in order.workers)

    def check_segment(self, order: RunSegment) -> None:
        """The layer and the one before it, whose end the segment computes, are at hand."""
        units = set((self.device if self.staged else self.host).values())
        assert self.num_layers in units
        if order.layer < self.num_layers:
            assert (self.device if self.staged else self.host)[order.slot] == order.layer
        if order.layer > 0:
            assert order.layer - 1 in units, "the layer behind the attention is gone"

    def run_pass(self, parts: list[tuple[int, ...]]) -> None:
        ran: Counter[tuple[int, int]] = Counter()
        attended: Counter[tuple[int, int, int]] = Counter()
        self.take(self.schedule.begin_pass(parts))
        while not self.schedule.pass_done:
            choices = [name for name in ("loading", "uploading", "segments", "attending") if getattr(self, name)]
            assert choices, f"deadlock: {self.schedule.waiting_for()}"
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
                    segment = self.segments.pop(0)
                    self.check_segment(segment)
                    k = segment.micro_batch
                    ran[segment.layer, k] += 1
                    if segment.layer > 0:
                        assert all(attended[segment.layer - 1, k, worker] == 1 for worker in parts[k])
                    self.take(self.schedule.segment_done(segment.layer, k))
                case "attending":
                    order, worker = self.attending.pop(self.random.randrange(len(self.attending)))
                    k = order.micro_batch
                    assert ran[order.layer, k] == 1
                    attended[order.layer, k, worker] += 1
                    self.take(self.schedule.attended(order.layer, k))
        expected = {(layer, k): 1 for layer in range(self.num_layers + 1) for k in range(len(parts))}
        assert ran == expected, "every (layer, micro-batch) exactly once"


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    num_layers = draw(st.integers(1, 9))
    resident = draw(st.integers(0, num_layers))
    streamed = num_layers - resident
    slots = draw(st.integers(min(2, streamed), max(2, streamed))) if streamed else 0
    slots = min(slots, streamed)
    device_slots = draw(st.none() | st.integers(min(2, num_layers), num_layers))
    return Machine(num_layers, resident, slots, device_slots, draw(st.integers(0, 2**32)))


PASSES = st.lists(
    st.lists(st.sets(st.integers(0, 2), min_size=1).map(lambda s: tuple(sorted(s))), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@given(machines(), PASSES)
def test_every_pass_runs_in_order_and_ends(machine: Machine, passes: list[list[tuple[int, ...]]]) -> None:
    for parts in passes:
        machine.run_pass(parts)


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


def test_columns_come_before_rows() -> None:
    """All micro-batches of a layer before any of the next, when nothing is late."""
    ring = SlotRing({2: 2, 0: 0, 1: 1}, (), ())
    schedule = Schedule(2, ring, compute_credit=1)
    schedule.start()
    for unit in (2, 0, 1):
        schedule.loaded(unit)
    order, seen = schedule.begin_pass([(0,), (0,), (0,)]), []
    while order:
        segment = next(o for o in order if isinstance(o, RunSegment))
        seen.append((segment.layer, segment.micro_batch))
        order = schedule.segment_done(segment.layer, segment.micro_batch)
        if segment.layer < 2:
            order += schedule.attended(segment.layer, segment.micro_batch)
    assert seen == [(layer, k) for layer in range(3) for k in range(3)]


@given(st.integers(1, 100).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_resident_layers_are_spread_evenly(sizes: tuple[int, int]) -> None:
    count, total = sizes
    layers = spread_evenly(count, total)
    assert len(layers) == count
    gaps = [b - a for a, b in itertools.pairwise(layers)]
    assert not gaps or max(gaps) - min(gaps) <= 1

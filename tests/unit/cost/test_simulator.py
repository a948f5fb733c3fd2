"""Passes whose times can be reckoned by hand, and what holds for any."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.cost.job import JobRequest, JobTime, _chosen, predict
from flexgen_lite.cost.pass_work import MicroBatchWork
from flexgen_lite.cost.rates import AttentionRates, Curve, Rates, SegmentRates
from flexgen_lite.cost.simulator import ATTENTION, COMPUTE, DISK, PassTime, Simulator
from flexgen_lite.queue.batching import Batcher
from flexgen_lite.queue.kv_on_disk import KvOnDisk
from flexgen_lite.queue.micro_batch import MicroBatch
from flexgen_lite.queue.page_table import PageTable
from flexgen_lite.schedule.slot_ring import SlotRing
from flexgen_lite.schedule.zigzag import Schedule
from flexgen_lite.wire.arena_specs import KvGroup
from flexgen_lite.wire.kv_on_disk import ParkKv

ONE = Curve(((1, 1.0),))


def rates(**keeps: float) -> Rates:
    segments = {"raw 0>0": SegmentRates(ONE, ONE)}
    return Rates(
        segments, {}, ONE, {0: AttentionRates(0, 0, 0, 0)}, {}, {}, ONE, (0.0, 0.0), **keeps
    )  # fmt: skip


class FixedWork:
    """Whatever the micro-batches are."""

    def __init__(self, batches: list[MicroBatchWork], load: float, begin: float = 0.0) -> None:
        self.batches, self._load, self._begin = batches, load, begin

    def load(self, unit: int) -> float:
        return self._load

    def upload(self, unit: int) -> float:
        return self._load

    def move(self, num_slots: int) -> float:
        return 0.25 * num_slots

    def begin(self, micro_batches: list[MicroBatch]) -> float:
        return self._begin

    def of_pass(self, micro_batches: list[MicroBatch]) -> list[MicroBatchWork]:
        return [self.of(batch) for batch in micro_batches]

    def of(self, batch: MicroBatch) -> MicroBatchWork:
        return self.batches[batch.num_rows]


def schedule(layers: int, resident: int, slots: int = 2) -> Schedule:
    pinned = {layers: resident + slots} | {layer: layer for layer in range(resident)}
    ring = SlotRing(pinned, range(resident, layers), range(resident, resident + slots))
    return Schedule(list(range(layers)), ring)


def simulator(work: FixedWork, order: Schedule, workers: int = 1, **keeps: float) -> Simulator:
    return Simulator(order, work, rates(**keeps), workers)  # type: ignore[arg-type]


def alike(layers: int, segment: float, attends: float, beside_disk: float = 1.0) -> MicroBatchWork:
    return MicroBatchWork((0,), (segment,) * (layers + 1), (0.8,) * (layers + 1), ({0: attends},) * layers, beside_disk)


def batches(count: int) -> list[MicroBatch]:
    return [MicroBatch(num_rows=k) for k in range(count)]


def test_in_memory_one_micro_batch_alternates_with_attention() -> None:
    made = simulator(FixedWork([alike(4, 1.0, 0.5)], 0.0, begin=0.25), schedule(4, 4))
    assert made.load_all() == pytest.approx(0.0, abs=1e-6)
    found = made.run(batches(1))
    assert found.seconds == pytest.approx(5 * 1.0 + 4 * 0.5 + 0.25)
    assert found.busy == pytest.approx({COMPUTE: 5.0, ATTENTION: 2.0}, abs=1e-6)


def test_two_micro_batches_hide_their_attention() -> None:
    made = simulator(FixedWork([alike(4, 1.0, 0.5)] * 2, 0.0), schedule(4, 4))
    made.load_all()
    assert made.run(batches(2)).seconds == pytest.approx(10.0)


def test_layers_from_a_slow_disk_set_the_pace() -> None:
    made = simulator(FixedWork([alike(6, 0.1, 0.0)], 1.0), schedule(6, 0))
    made.load_all()
    made.run(batches(1))
    found = made.run(batches(1))
    assert found.seconds == pytest.approx(6.0, abs=0.3)
    assert found.busy[DISK] == pytest.approx(found.seconds, rel=0.05)


def test_lanes_take_from_each_other() -> None:
    alone = simulator(FixedWork([alike(6, 1.0, 0.0)], 0.9), schedule(6, 0))
    slowed = simulator(FixedWork([alike(6, 1.0, 0.0, beside_disk=0.5)], 0.9), schedule(6, 0))
    disk = simulator(FixedWork([alike(6, 0.1, 0.0)], 0.9), schedule(6, 0), reads_beside_compute=0.5)
    seconds = []
    for one in (alone, slowed, disk):
        one.load_all()
        one.run(batches(1))
        seconds.append(one.run(batches(1)).seconds)
    assert seconds[1] > 1.3 * seconds[0]
    assert 6 * 0.9 < seconds[2] < 6 * (0.9 + 0.2), "the disk is alone most of the time"


@given(
    layers=st.integers(2, 8),
    resident=st.integers(0, 8),
    slots=st.integers(2, 4),
    times=st.lists(st.tuples(st.floats(0.001, 2), st.floats(0, 2)), min_size=1, max_size=3),
    load=st.floats(0.001, 3),
)
def test_no_pass_is_shorter_than_its_busiest_lane_or_longer_than_all(
    layers: int, resident: int, slots: int, times: list[tuple[float, float]], load: float
) -> None:
    resident = min(resident, layers)
    work = [alike(layers, segment, attends) for segment, attends in times]
    made = simulator(FixedWork(work, load), schedule(layers, resident, slots))
    made.load_all()
    for _ in range(3):
        found = made.run(batches(len(work)))
        compute = sum(segment * (layers + 1) for segment, _ in times)
        assert found.busy[COMPUTE] == pytest.approx(compute)
        assert found.seconds >= max(found.busy.values()) - 1e-6
        everything = compute + sum(attends * layers for _, attends in times) + load * (layers - resident + slots)
        assert found.seconds <= everything + 1e-6


def test_a_job_is_followed_to_its_end_and_longer_ones_go_on() -> None:
    def job(count: int) -> float:
        group = KvGroup((0, 1), 16)
        batcher = Batcher(PageTable(400, (group,), 1), 8, 1, 64, False, False)
        made = simulator(_Counted(0.0), schedule(2, 2))
        found = predict(batcher, made, [JobRequest(4, 5, 5)] * count, 8)
        assert found is not None
        assert (found.requests, found.generated_tokens, found.prompt_tokens) == (count, 5 * count, 4 * count)
        assert found.followed == min(count, 400)
        return found.seconds

    assert job(8) == pytest.approx(5 * 3.0), "all at once: a pass for each token"
    assert job(16) == pytest.approx(10 * 3.0)
    assert job(4000) == pytest.approx(10 * job(400), rel=0.02)


@pytest.mark.parametrize(("answer", "prompts"), [(200, 8), (200, 11), (37, 30)])
def test_passes_that_are_alike_are_counted_and_not_run(answer: int, prompts: int) -> None:
    group = KvGroup((0, 1), 16)
    batcher = Batcher(PageTable(400, (group,), 1), 8, 1, 64, False, False)
    work = _Counted(0.0)
    found = predict(batcher, simulator(work, schedule(2, 2)), [JobRequest(4, answer, answer)] * prompts, 8)
    rounds = -(-prompts // 8)
    assert found is not None
    assert found.passes == rounds * answer and found.seconds == pytest.approx(3.0 * rounds * answer)
    assert work.asked < found.passes / 4
    assert found.done_at[-1] == pytest.approx(found.seconds)


def test_answers_end_where_they_are_expected_to() -> None:
    group = KvGroup((0, 1), 16)
    batcher = Batcher(PageTable(400, (group,), 1), 8, 1, 64, False, False)
    found = predict(batcher, simulator(_Counted(0.0), schedule(2, 2)), [JobRequest(4, 3, 50)] * 8, 8)
    assert found is not None and found.passes == 3


def test_what_the_engine_refuses_takes_no_time_and_what_has_no_room_ends() -> None:
    def job(*requests: JobRequest) -> JobTime | None:
        group = KvGroup((0, 1), 16)
        batcher = Batcher(PageTable(400, (group,), 1), 8, 1, 64, False, False)
        return predict(batcher, simulator(_Counted(0.0), schedule(2, 2)), requests, 8, longest=40)

    assert job(JobRequest(40, 5, 5)) is None
    assert job(JobRequest(1, 0, 0)) is None, "nothing to compute"
    found = job(JobRequest(40, 5, 5), JobRequest(30, 50, 50))
    assert found is not None and (found.requests, found.followed, found.passes) == (2, 1, 10)
    assert (found.prompt_tokens, found.generated_tokens, found.seconds) == (30, 10, pytest.approx(30.0))
    several = job(*[JobRequest(40, 5, 5), JobRequest(30, 5, 5)] * 1000)
    alone = job(*[JobRequest(30, 5, 5)] * 1000)
    assert several is not None and alone is not None
    assert several.seconds == pytest.approx(alone.seconds, rel=0.05) and several.generated_tokens == 5000


def test_scored_prompts_ask_the_head_for_each_of_their_tokens() -> None:
    class Asked(_Counted):
        def of(self, batch: MicroBatch) -> MicroBatchWork:
            scored.extend(len(piece.scored.targets) for piece in batch.pieces if piece.scored is not None)
            return super().of(batch)

    scored: list[int] = []
    group = KvGroup((0, 1), 16)
    batcher = Batcher(PageTable(400, (group,), 1), 8, 1, 64, False, False)
    found = predict(batcher, simulator(Asked(0.0), schedule(2, 2)), [JobRequest(20, 0, 0, True)] * 3, 8)
    assert found is not None and scored == [19] * 3


def test_products_and_attention_take_from_each_other() -> None:
    def seconds(**keeps: float) -> float:
        made = simulator(FixedWork([alike(4, 1.0, 1.0)] * 2, 0.0), schedule(4, 4), **keeps)
        made.load_all()
        return made.run(batches(2)).seconds

    free, shared = seconds(), seconds(computes_beside_attention=0.5, attends_beside_compute=0.5)
    assert free == pytest.approx(10.0, abs=1.1), "attention is behind the other's products"
    assert shared == pytest.approx(18.0, abs=1.1), "as if one came after the other"


@pytest.mark.parametrize("page_tokens", [16, 32])
def test_beginnings_that_others_have_are_computed_once(page_tokens: int) -> None:
    class Rows(_Counted):
        def of(self, batch: MicroBatch) -> MicroBatchWork:
            rows.append(batch.num_rows)
            return super().of(batch)

    beginning = tuple(bytes([block]) for block in range(6))
    jobs = [JobRequest(100, 1, 1, shared=beginning[:4])] + [JobRequest(100, 1, 1, shared=beginning)] * 9
    counts = {}
    for share in (False, True):
        rows: list[int] = []
        batcher = Batcher(PageTable(400, (KvGroup((0, 1), page_tokens),), 1), 8, 1, 512, False, share)
        found = predict(batcher, simulator(Rows(0.0), schedule(2, 2)), jobs, 8)
        assert found is not None and found.prompt_tokens == 1000
        counts[share] = sum(rows)
    assert counts == {False: 1000, True: 100 + 36 + 8 * 4}


def test_long_jobs_are_followed_in_stretches_from_everywhere() -> None:
    assert _chosen(10, 20) == list(range(10))
    places = _chosen(10_000, 400)
    assert len(places) == 400 == len(set(places)) and places[:16] == list(range(16))
    assert max(b - a for a, b in pairwise(places)) < 500 and places[-1] > 9_500


def test_kv_takes_its_share_of_the_disk_from_one_pass_into_the_next() -> None:
    def passes(moves: int) -> tuple[list[PassTime], list[int], Simulator]:
        made = simulator(FixedWork([alike(6, 0.1, 0.0)], 1.0), schedule(6, 0))
        made.load_all()
        made.run(batches(1))
        made.move([ParkKv(ticket, (1, 2), -1, (0, 1)) for ticket in range(moves)])
        found, done = [], []
        for _ in range(4):
            found.append(made.run(batches(1)))
            done.append(len(made.take_moved()))
        return found, done, made

    alone, beside = passes(0)[0], passes(4)
    assert alone[0].seconds == pytest.approx(6.0, abs=0.3)
    assert beside[0][0].seconds == pytest.approx(6.0 / 0.8, abs=0.3), "weights have four fifths of the disk"
    assert sum(one.seconds for one in beside[0]) == pytest.approx(sum(one.seconds for one in alone) + 4 * 0.5, abs=0.5)
    assert beside[1] == [2, 2, 0, 0] and all(one.busy[DISK] <= one.seconds + 1e-9 for one in beside[0])
    made = simulator(FixedWork([alike(6, 1.0, 0.0)], 0.0), schedule(6, 6))
    made.load_all()
    made.move([ParkKv(7, (1, 2), -1, (0, 1))])
    waited = made.wait_for_move()
    assert waited.seconds == pytest.approx(0.5) and waited.busy == {DISK: pytest.approx(0.5)}
    assert [order.ticket for order in made.take_moved()] == [7]


def test_parked_sequences_are_away_until_they_are_moved() -> None:
    class Disk(_Counted):
        def __init__(self, seconds_of_a_page: float) -> None:
            super().__init__(0.0)
            self._each = seconds_of_a_page

        def move(self, num_slots: int) -> float:
            moved.append(num_slots)
            return self._each * num_slots

    def job(slots: int, seconds_of_a_page: float) -> JobTime:
        table = PageTable(24, (KvGroup((0, 1), 16),), 1)
        disk = KvOnDisk(table, (KvGroup((0, 1), 16),), slots) if slots else None
        batcher = Batcher(table, 16, 1, 64, False, False, disk=disk)
        found = predict(
            batcher, simulator(Disk(seconds_of_a_page), schedule(2, 2)), [JobRequest(40, 100, 200)] * 40, 16
        )
        assert found is not None and found.generated_tokens == 4000 and table.used_pages == 0
        assert found.seconds == pytest.approx(found.done_at[-1])
        return found

    moved: list[int] = []
    cautious = job(0, 0.0)
    assert cautious.preempted == 0 and not moved
    times = []
    for seconds_of_a_page in (0.0, 0.5, 20.0, 500.0):
        parked = job(1000, seconds_of_a_page)
        assert parked.preempted > 0 and parked.passes < 0.8 * cautious.passes
        times.append(parked.seconds)
    assert times[0] < 0.8 * cautious.seconds and times[1] < 1.1 * times[0], "it goes on beside the passes"
    assert times == sorted(times) and times[-1] > 2 * times[0], "which wait for it at last"


class _Counted(FixedWork):
    def __init__(self, load: float) -> None:
        super().__init__([], load)
        self.asked = 0

    def of(self, batch: MicroBatch) -> MicroBatchWork:
        self.asked += 1
        return alike(2, 1.0, 0.0)

"""Passes composed while sequences are parked on disk and brought back, in any order of answers, with failures: every
token computed once, nothing read that was not written, no page used that is on its way, everything ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.memory.kv_groups import pages_for
from flexgen_lite.queue.batching import Batcher
from flexgen_lite.queue.kv_on_disk import KvOnDisk
from flexgen_lite.queue.micro_batch import MicroBatch, Piece, Result
from flexgen_lite.queue.page_table import PageTable
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.queue.waiting_queue import WaitingQueue
from flexgen_lite.wire.arena_specs import KvGroup
from flexgen_lite.wire.kv_on_disk import FetchBlocks, FetchKv, KvMoved, MoveKv, ParkKv, StoreBlocks
from tests.kv_groups import one_group
from tests.property.test_batching import EOS, GROUPS, check_rows, check_states, queue, request

Held = tuple[int, tuple[int, ...]]  # group, all tokens up to the one whose K and V are there


class Machine:
    """Pages, states, files, and a loader that does what it is told in order, when it comes to it."""

    def __init__(self, groups: Sequence[KvGroup]) -> None:
        self._groups = groups
        self._pages: dict[tuple[int, int], Held] = {}
        self._states: dict[int, tuple[int, ...]] = {}
        self._parked: dict[int, object] = {}
        self._blocks: dict[int, tuple[bytes, list[dict[int, Held]]]] = {}
        self.orders: deque[MoveKv] = deque()

    # -------------------------------------------------------------------------------------------- the pass

    def check(self, piece: Piece) -> None:
        """What it sees of its past is there, and nothing that it has is on its way."""
        asked, tokens, stored = piece.request, tuple(piece.request.tokens), piece.request.stored
        assert not asked.moving and asked.parked is None
        for index, group in enumerate(self._groups):
            for position in range(group.first_seen(stored), stored):
                held = self._pages.get(self._place(piece, index, position))
                assert held == (index, tokens[: position + 1]), "another token's K and V"
        reading, writing = self._on_their_way()
        assert not reading & {page for run in asked.pages for page in run.pages}
        end = stored + piece.num_rows
        for index, group in enumerate(self._groups):
            for position in range(stored, end, group.page_tokens):
                assert self._place(piece, index, position)[0] not in writing, "written to while it is being saved"
        if asked.state >= 0:
            source = asked.state_places[0]
            assert source == -1 or self._states[source] == tokens[:stored]

    def store(self, piece: Piece) -> None:
        tokens, first = tuple(piece.request.tokens), piece.request.stored
        for index in range(len(self._groups)):
            for position in range(first, first + piece.num_rows):
                self._pages[self._place(piece, index, position)] = index, tokens[: position + 1]
        if piece.request.state >= 0:
            self._states[piece.request.state_places[1]] = tokens[: first + piece.num_rows]

    def _place(self, piece: Piece, index: int, position: int) -> tuple[int, int]:
        run, (page, within) = piece.request.pages[index], divmod(position, self._groups[index].page_tokens)
        assert page >= run.first, "behind its window"
        return run.pages[page - run.first], within

    # -------------------------------------------------------------------------------------------- the loader

    def _on_their_way(self) -> tuple[set[int], set[int]]:
        """Pages that will be read to, and pages that will be written from."""
        into: set[int] = set()
        out: set[int] = set()
        for order in self.orders:
            match order:
                case FetchKv():
                    into |= set(order.pages)
                case ParkKv():
                    out |= set(order.pages)
                case FetchBlocks():
                    into |= {page for block in order.blocks for page in block.pages if page >= 0}
                case StoreBlocks():
                    out |= {page for block in order.blocks for page in block.pages}
        assert not into & out
        return into, out

    def take(self, orders: Sequence[MoveKv]) -> None:
        self.orders += orders
        for order in orders:  # what is read to may hold anything until it is read
            pages = order.pages if isinstance(order, FetchKv) else ()
            if isinstance(order, FetchBlocks):
                pages = tuple(page for block in order.blocks for page in block.pages)
            for page in pages:
                self._write(page, {})

    def work(self, fails: bool) -> KvMoved:
        """The first order is done, or half of it, which fails."""
        order = self.orders.popleft()
        checksums: tuple[int, ...] = ()
        match order:
            case ParkKv():
                values: list[object] = [self._read(page) for page in order.pages]
                values += [self._states.get(order.state)] * (len(order.slots) - len(values))
                count = len(values) // 2 if fails else len(values)
                self._parked |= dict(zip(order.slots[:count], values, strict=False))
                checksums = () if fails else order.slots
            case FetchKv():
                assert order.checksums == order.slots, "of other slots"
                for page, slot in zip(order.pages, order.slots, strict=False):
                    self._write(page, {} if fails else self._parked[slot])
                if order.state >= 0:
                    self._states[order.state] = (-1,) if fails else self._parked[order.slots[-1]]  # type: ignore[assignment]
            case StoreBlocks():
                for block in order.blocks:
                    pages = [] if fails else [self._read(page) for page in block.pages]
                    self._blocks[block.slot] = (b"" if fails else block.key), pages
            case FetchBlocks():
                for block in order.blocks:
                    key, pages = self._blocks[block.slot]
                    assert key == block.key, "another block's slot"
                    for page, held in zip(block.pages, pages, strict=True):
                        if page >= 0 and not fails:
                            self._write(page, held)
        return KvMoved(order.ticket, checksums, 0, 0, 0, "no space" if fails else "")

    def _read(self, page: int) -> dict[int, Held]:
        return {within: held for (number, within), held in self._pages.items() if number == page}

    def _write(self, page: int, held: object) -> None:
        for place in [place for place in self._pages if place[0] == page]:
            del self._pages[place]
        assert isinstance(held, dict)
        self._pages |= {(page, within): what for within, what in held.items()}


def pieces_of(composed: Sequence[MicroBatch]) -> list[Piece]:
    return [piece for micro_batch in composed for piece in micro_batch.pieces]


@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 3) | st.none()), min_size=1, max_size=25
    ),
    pages=st.integers(10, 30),
    groups=st.sampled_from(GROUPS),
    workers=st.integers(1, 2),
    max_sequences=st.integers(1, 12),
    tokens=st.integers(12, 40),
    slots=st.sampled_from([0, 10, 60, 1000]),
    prefix_slots=st.sampled_from([0, 2, 12, 200]),
    failing=st.sampled_from([0.0, 0.0, 0.3]),
    pace=st.sampled_from([0.1, 0.5, 1.0]),
    has_states=st.booleans(),
    random=st.randoms(use_true_random=False),
)
def test_every_request_is_served(
    prompts, pages, groups, workers, max_sequences, tokens, slots, prefix_slots, failing, pace, has_states, random
) -> None:  # type: ignore[no-untyped-def]
    pages = max(pages * len(groups), pages_for(groups, 100, tokens))
    table = PageTable(pages * workers, groups, workers)
    num_states = max_sequences if has_states else 0
    disk = KvOnDisk(table, groups, slots, 2 if has_states else 0, 0 if has_states else prefix_slots)
    limits = max_sequences, 2, tokens, False
    batcher = Batcher(table, *limits, share=not has_states, num_states=num_states, disk=disk)
    batcher.expected_life.share = 0.0  # so that more are admitted than have room
    machine = Machine(groups)
    waiting = queue(request(i, *prompt) for i, prompt in enumerate(prompts))
    if prefix_slots and not has_states:
        disk.open_prefixes([], True)
    ended: set[int] = set()
    cancelled: set[int] = set()
    stood = 0
    while waiting or batcher.running:
        if random.random() < 0.05:
            cancel(random, batcher, waiting, cancelled)
        composed = batcher.compose(waiting)
        machine.take(disk.take_orders())
        assert composed or disk.is_moving or not (waiting or batcher.running), "nothing to do and nothing to wait for"
        for piece in pieces_of(composed):
            machine.check(piece)
        check_states(batcher, num_states) if has_states else None
        stood = 0 if composed else stood + 1
        assert stood < 2000
        answer = deque(machine.orders)
        while answer and random.random() < pace:  # while the pass goes on
            answer.popleft()
            batcher.moved(machine.work(random.random() < failing), waiting)
            machine.take(disk.take_orders())
        results = []
        for index, micro_batch in enumerate(composed):
            check_rows(micro_batch, index, workers, tokens)
            for piece in micro_batch.pieces:
                machine.store(piece)
            wanted = sum(piece.completes for piece in micro_batch.pieces)
            results.append(Result(tuple(random.choice([1, 2, 3, 4, EOS]) for _ in range(wanted))))
        for done in batcher.commit(composed, results):
            assert done.id not in ended
            ended.add(done.id)
        machine.take(disk.take_orders())
    while machine.orders:
        batcher.moved(machine.work(False), waiting)
        machine.take(disk.take_orders())
    assert ended | cancelled == set(range(len(prompts))) and not ended & cancelled
    assert table.used_pages == 0 and not disk.is_moving
    assert disk.num_slots_used == 0 and disk.num_parked == 0
    assert not has_states or sorted(batcher._states) == list(range(num_states))


def cancel(random: Random, batcher: Batcher, waiting: WaitingQueue, cancelled: set[int]) -> None:
    """One that waits, or that runs, between passes."""
    some = [*waiting, *batcher.running.values()]
    if not some:
        return
    one = random.choice(some)
    cancelled.add(one.id)
    if one.id in batcher.running:
        batcher.release(one)
        return
    for gone in waiting.remove(lambda other: other is one):
        batcher.forget(gone)


class Run:
    """One worker's batcher whose loader does at once what it is told, or when it is asked to."""

    def __init__(self, pages: int, slots: int = 1000, prefix_slots: int = 0, at_once: bool = True) -> None:
        self.groups = one_group(8)
        self.table = PageTable(pages, self.groups, 1)
        self.disk = KvOnDisk(self.table, self.groups, slots, prefix_slots=prefix_slots)
        self.batcher = Batcher(self.table, 8, 1, 64, spread=False, disk=self.disk)
        self.batcher.expected_life.share = 0.0
        self.machine = Machine(self.groups)
        self.at_once = at_once
        if prefix_slots:
            self.disk.open_prefixes([], True)

    def work(self, waiting: WaitingQueue) -> None:
        self.machine.take(self.disk.take_orders())
        while self.machine.orders:
            self.batcher.moved(self.machine.work(False), waiting)
            self.machine.take(self.disk.take_orders())

    def step(self, waiting: WaitingQueue) -> dict[int, tuple[int, int]]:
        """A pass: (first position, rows) of each request."""
        composed = self.batcher.compose(waiting)
        if self.at_once:
            self.work(waiting)
        found = {}
        for piece in pieces_of(composed):
            self.machine.check(piece)
            found[piece.request.id] = piece.request.stored, piece.num_rows
            self.machine.store(piece)
        self.batcher.commit(composed, [Result((1,) * sum(p.completes for p in m.pieces)) for m in composed])
        return found


def rows_of(passes: Sequence[dict[int, tuple[int, int]]]) -> int:
    return sum(rows for one in passes for _, rows in one.values())


def test_nothing_is_computed_twice_and_nobody_sits_out() -> None:
    """As long as the disk keeps up: who needs pages has them, for room is made a pass ahead."""
    run = Run(pages=12)
    requests = [request(i, 20, 60) for i in range(3)]
    waiting, passes = queue(requests), []
    while waiting or run.batcher.running:
        passes.append(run.step(waiting))
    assert rows_of(passes) == 3 * (20 + 59)
    assert run.batcher.num_preempted > 0 and run.disk.totals["parked_sequences"] == run.batcher.num_preempted
    riding = [number for number, one in enumerate(passes) if 0 in one]
    assert riding == list(range(len(riding))), "the oldest rides in every pass"


def test_pages_are_nobodys_until_they_are_written() -> None:
    run = Run(pages=8, at_once=False)
    waiting = queue([request(0, 20, 40), request(1, 20, 40)])
    while not run.disk.is_moving:
        run.step(waiting)
    (parked,) = waiting
    assert parked.moving and parked.parked is not None and parked.stored == 0
    used = run.table.used_pages
    while run.step(waiting):
        assert run.table.used_pages == used or run.table.num_free(0) >= 0
    assert 0 in run.batcher.running, "it sits out"
    assert run.step(waiting) == {} and run.batcher.num_preempted == 1
    run.work(waiting)
    assert set(run.step(waiting)) == {0}


def test_where_there_is_no_slot_a_sequence_is_computed_again() -> None:
    run = Run(pages=12, slots=2)
    waiting, passes = queue(request(i, 20, 60) for i in range(3)), []
    while waiting or run.batcher.running:
        passes.append(run.step(waiting))
    assert rows_of(passes) > 3 * (20 + 59)
    assert run.batcher.num_preempted > 0 and run.disk.totals["parked_sequences"] == 0


def test_a_sequence_that_is_over_leaves_its_slots() -> None:
    run = Run(pages=8)
    waiting = queue([request(0, 20, 40), request(1, 20, 40)])
    while not run.disk.num_parked:
        run.step(waiting)
    assert run.disk.num_slots_used > 0
    for gone in waiting.remove(lambda one: one.id == 1):
        run.batcher.forget(gone)
    assert run.disk.num_slots_used == 0 and run.disk.num_parked == 0


def test_beginnings_that_memory_has_no_more_come_from_disk() -> None:
    run = Run(pages=20, prefix_slots=50)
    waiting = queue([request(0, 40, 1, kind=1)])
    assert run.step(waiting) == {0: (0, 40)}
    run.work(waiting)
    waiting = queue([request(1, 160, 1)])
    run.step(waiting), run.step(waiting), run.step(waiting)  # memory is full of it
    run.work(waiting)
    waiting = queue([request(2, 44, 1, kind=1)])
    assert run.step(waiting) == {}, "it is being read"
    assert run.step(waiting) == {2: (40, 4)}
    assert run.disk.totals["disk_prefix_tokens"] == 40


@pytest.mark.parametrize("usable", [True, False])
def test_another_run_goes_on_from_what_one_has_stored(usable: bool) -> None:
    first, again = Run(pages=20, prefix_slots=50), Run(pages=20, prefix_slots=50)
    waiting = queue([request(0, 40, 1, kind=1)])
    first.step(waiting)
    first.work(waiting)
    again.machine._blocks = first.machine._blocks
    stored = [(key, slot) for slot, (key, _) in first.machine._blocks.items()]
    again.disk.open_prefixes(stored if usable else [], usable)
    waiting = queue([request(0, 40, 1, kind=1)])
    found = [again.step(waiting), again.step(waiting)]
    assert found == ([{}, {0: (32, 8)}] if usable else [{0: (0, 40)}, {}])


def test_a_beginning_that_cannot_be_read_is_computed() -> None:
    run = Run(pages=20, prefix_slots=50, at_once=False)
    run.disk.open_prefixes([(key, slot) for slot, key in enumerate(keys(request(0, 40, 1, kind=1)))], True)
    waiting = queue([request(0, 40, 1, kind=1)])
    assert run.step(waiting) == {}
    (order,) = run.disk.take_orders()
    run.batcher.moved(KvMoved(order.ticket, (), 0, 0, 0, "torn"), waiting)
    assert [r.id for r in waiting] == [0]
    assert run.step(waiting) == {0: (0, 40)}


def keys(one: RunningRequest) -> tuple[bytes, ...]:
    batcher = Batcher(PageTable(20, one_group(8), 1), 1, 1, 8, spread=False)
    return batcher._keys(one)


def test_whole_blocks_are_written_for_others_will_share_them() -> None:
    """Pages of the group with a window are a quarter of a block."""
    groups = (KvGroup((0,), 32), KvGroup((1,), 8, window=20))
    table = PageTable(200, groups, 1)
    disk = KvOnDisk(table, groups, 100)
    one = request(1, 128, 8)
    pages = table.allocate(one.id, 0, 128, 100)
    assert pages is not None
    one.worker, one.stored = 0, 100
    one.pages = table.grow(one.id, 100, 128) or ()
    assert groups[1].first_seen(100) // 8 == 10, "in the middle of the block that begins with page 8"
    assert disk.park(one) and one.parked is not None
    assert one.parked.firsts == (0, 8)
    (order,) = disk.take_orders()
    assert isinstance(order, ParkKv) and len(order.pages) == 4 + 5, "up to token 100"


def test_a_group_that_is_suspected_runs_as_a_whole_or_not_at_all() -> None:
    """A pass without those that are being read would clear them."""
    groups = one_group(16)
    table = PageTable(40, groups, 1)
    disk = KvOnDisk(table, groups, 40)
    batcher = Batcher(table, 8, 1, 64, False, False, disk=disk)
    waiting = queue([request(1, 20, 8), request(2, 20, 8)])
    (batch,) = batcher.compose(waiting)
    assert len(batch.pieces) == 2
    batcher.running[2].moving = True
    assert batcher.compose(waiting, frozenset((1, 2))) == []
    (batch,) = batcher.compose(waiting, frozenset((1,)))
    assert [piece.request.id for piece in batch.pieces] == [1]
    batcher.running[2].moving = False
    (batch,) = batcher.compose(waiting, frozenset((1, 2)))
    assert len(batch.pieces) == 2

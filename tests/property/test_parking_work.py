"""Sequences that are parked do not go to and fro: what is written and read is in proportion to what is generated."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.queue.batching import Batcher
from flexgen_lite.queue.expected_life import AHEAD
from flexgen_lite.queue.kv_on_disk import KvOnDisk
from flexgen_lite.queue.micro_batch import Piece, Result
from flexgen_lite.queue.page_table import PageTable
from flexgen_lite.wire.kv_on_disk import FetchKv, KvMoved, MoveKv, ParkKv
from tests.kv_groups import one_group
from tests.property.test_batching import EOS, queue, request
from tests.property.test_parking import pieces_of

PAGE = 8


class Work:
    """What a job of sequences that live for so many tokens comes to; the disk does `pace` orders in a pass."""

    def __init__(
        self, lives: Sequence[tuple[int, int]], pages: int, max_tokens: int, slots: int = 100_000, pace: int = 100
    ) -> None:
        table = PageTable(pages, one_group(PAGE), 1)
        disk = KvOnDisk(table, one_group(PAGE), slots)
        self.batcher = Batcher(table, 64, 2, 256, spread=False, share=False, disk=disk)
        self.passes = self.moved = self.computed = self.generated = 0
        waiting = queue(request(i, prompt, max_tokens) for i, (prompt, _) in enumerate(lives))
        orders: list[MoveKv] = []
        while waiting or self.batcher.running:
            composed = self.batcher.compose(waiting)
            orders += disk.take_orders()
            assert composed or orders, "nothing goes on"
            results = [Result(self._drawn(micro_batch.pieces, lives)) for micro_batch in composed]
            self.passes += bool(composed)
            self.batcher.commit(composed, results)
            for _ in range(min(pace, len(orders))):
                order = orders.pop(0)
                assert isinstance(order, ParkKv | FetchKv)
                self.moved += PAGE * len(order.pages)
                self.batcher.moved(KvMoved(order.ticket, order.slots, 0, 0, 0, ""), waiting)
                orders += disk.take_orders()
            self.computed += sum(piece.num_rows for piece in pieces_of(composed))

    def _drawn(self, pieces: Sequence[Piece], lives: Sequence[tuple[int, int]]) -> tuple[int, ...]:
        ending = [p.request for p in pieces if p.completes]
        self.generated += len(ending)
        return tuple(EOS if one.num_generated + 1 >= lives[one.id][1] else 1 for one in ending)


@given(
    lives=st.lists(st.tuples(st.integers(1, 120), st.integers(1, 200)), min_size=1, max_size=40),
    pages=st.integers(45, 120),
    pace=st.sampled_from([1, 2, 100]),
)
def test_what_is_moved_is_in_proportion_to_what_is_generated(
    lives: list[tuple[int, int]], pages: int, pace: int
) -> None:
    work = Work(lives, pages, max_tokens=220, pace=pace)
    assert work.generated == sum(life for _, life in lives)
    assert work.moved <= 2 * (AHEAD + 1) * work.generated + 2 * PAGE * pages


@pytest.mark.parametrize(("life", "most"), [(30, 1.0), (100, 2.0), (220, 2.0)])
def test_it_is_little_where_sequences_live_for_long(life: int, most: float) -> None:
    work = Work([(24, life)] * 100, 120, max_tokens=220)
    assert work.moved <= most * work.generated
    assert work.computed <= 100 * (24 + life) + 2 * 2 * PAGE * work.batcher.num_preempted, "only what is too short"


def test_more_ride_where_they_can_be_parked() -> None:
    """A pass has nearly as many as there is room for what they hold on average."""
    lives = [(24, 10 + 37 * i % 80) for i in range(200)]
    cautious, parking = (Work(lives, 120, 220, slots) for slots in (119, 120))
    held = sum(life * (24 + life / 2) for _, life in lives) / sum(life for _, life in lives)
    could_ride = 120 * PAGE / held
    assert cautious.batcher.num_preempted == 0
    assert (
        cautious.generated / cautious.passes < 0.6 * could_ride < 0.75 * could_ride < parking.generated / parking.passes
    )

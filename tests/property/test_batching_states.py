"""Where the states of sequences are read and written, and where prompts are cut that mixers go through: Batcher."""

from __future__ import annotations

import pytest

from flexgen_lite.queue.batching import Batcher
from flexgen_lite.queue.micro_batch import Result
from flexgen_lite.queue.page_table import PageTable
from flexgen_lite.queue.waiting_queue import WaitingQueue
from tests.kv_groups import one_group
from tests.property.test_batching import queue, request, rows_by_pass


def state_places(batcher: Batcher, waiting: WaitingQueue, is_lost: bool = False) -> dict[int, tuple[int, int]]:
    """Of each request in the next pass, which is given up or not."""
    composed = batcher.compose(waiting)
    spans = {
        piece.request.id: (span.state_from, span.state_to)
        for index, micro_batch in enumerate(composed)
        for (_, piece), span in zip(micro_batch.in_rows(), micro_batch.token_batch(index).spans, strict=True)
    }
    if not is_lost:
        batcher.commit(composed, [Result((1,) * sum(p.completes for p in m.pieces)) for m in composed])
    return spans


def test_a_state_is_read_from_one_place_and_written_to_the_other() -> None:
    """In turn, and from and to the same ones where a pass is repeated; it is free for another with the end."""
    batcher = Batcher(PageTable(40, one_group(8), 1), 2, 1, 32, spread=False, share=False, num_states=2)
    waiting = queue([request(0, 40, 2), request(1, 3, 2), request(2, 3, 1)])
    found = [state_places(batcher, waiting, is_lost=number in (0, 2)) for number in range(6)]
    assert found[0] == found[1] == {0: (-1, 1)}
    assert found[2] == found[3] == {0: (1, 0), 1: (-1, 3)}
    assert found[4] == {0: (0, 1), 1: (3, 2)}
    assert found[5] == {2: (-1, 1)}


def test_a_state_is_given_back_where_its_sequence_is_preempted() -> None:
    """It begins anew, from no state."""
    batcher = Batcher(PageTable(4, one_group(8), 1), 2, 1, 32, spread=False, share=False, num_states=2)
    waiting = queue([request(0, 8, 20), request(1, 8, 20)])
    batcher.expected_life.share = 0.0
    places, stored = [], []
    while 0 in batcher.running or not places:
        places.append(state_places(batcher, waiting))
        stored.append({r.id: r.stored for r in batcher.running.values()})
    assert batcher.num_preempted == 1 and [r.state for r in waiting] == [-1]
    again = state_places(batcher, waiting)
    assert set(again) == {1} and again[1][0] == -1


@pytest.mark.parametrize(("tokens", "chunks"), [(300, [256, 256, 138]), (100, [64] * 9 + [74]), (40, [40] * 16 + [10])])
def test_chunks_of_prompts_end_where_the_parts_of_mixers_do(tokens: int, chunks: list[int]) -> None:
    """Where there is room for a part."""
    batcher = Batcher(PageTable(400, one_group(8), 1), 2, 1, tokens, spread=False, share=False, num_states=2)
    assert [rows[0][1] for rows in rows_by_pass(batcher, queue([request(0, 650, 1)]))] == chunks

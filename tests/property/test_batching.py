"""Passes composed from random requests: every token computed once and in order, limits kept, everything ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.batching import Batcher, MicroBatch, Result, RunningRequest
from flexgen_lite.page_table import PageTable
from flexgen_lite.sampling_wire import WireParams
from flexgen_lite.waiting_queue import WaitingQueue

EOS = 7


def request(number: int, prompt: int, max_tokens: int) -> RunningRequest:
    params = WireParams(max_tokens, 0, 0.0, 0, 1.0, None, (), False, True)
    return RunningRequest(number, [1] * prompt, prompt, params, seed=0, end_ids=frozenset({EOS}))


def queue(requests: Iterable[RunningRequest]) -> WaitingQueue:
    waiting = WaitingQueue()
    for one in requests:
        waiting.add(one)
    return waiting


def check_rows(micro_batch: MicroBatch, index: int, workers: int, limit: int) -> None:
    """The compute worker's rows and the attention workers' are the same rows, each once."""
    batch = micro_batch.token_batch(index)
    assert len(batch.token_ids) == micro_batch.num_rows <= limit
    covered = [row for span in batch.spans for row in range(span.row, span.row + span.num_rows)]
    assert covered == list(range(micro_batch.num_rows)), "rows without a gap: no padding"
    attended = [span for span in batch.spans if not span.prefill]
    assert attended == list(batch.spans[: len(attended)]), "the rows of the attention workers come first"
    stored = Counter(
        row
        for worker in range(workers)
        for span in micro_batch.kv_batch(index, worker).spans
        for row in range(span.row, span.row + span.num_rows)
    )
    assert stored == Counter(covered)
    assert {w for w in range(workers) if micro_batch.kv_batch(index, w).spans} == set(micro_batch.workers())


@given(
    prompts=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 6)), min_size=1, max_size=25),
    pages=st.integers(12, 40),
    workers=st.integers(1, 3),
    max_sequences=st.integers(1, 12),
    micro_batches=st.integers(1, 4),
    tokens=st.integers(12, 40),
    spread=st.booleans(),
    random=st.randoms(use_true_random=False),
)
def test_every_request_is_served(prompts, pages, workers, max_sequences, micro_batches, tokens, spread, random) -> None:  # type: ignore[no-untyped-def]
    table = PageTable(pages * workers, 8, workers)
    batcher = Batcher(table, max_sequences, micro_batches, tokens, spread)
    requests = [request(i, prompt, count) for i, (prompt, count) in enumerate(prompts)]
    waiting = queue(requests)
    finished: list[RunningRequest] = []
    stored: Counter[int] = Counter()
    limit = tokens
    while waiting or batcher.running:
        if random.random() < 0.05:  # passes turned out to be too large
            limit = batcher.limit_rows(random.randint(1, limit))
        running, sent_back = set(batcher.running), batcher.num_sent_back
        composed = batcher.compose(waiting)
        assert composed, "requests wait or run, but the pass is empty"
        assert len(composed) <= micro_batches and len(batcher.running) <= max_sequences
        seen = [piece.request.id for micro_batch in composed for piece in micro_batch.pieces]
        assert len(seen) == len(set(seen)), "a request rides once in a pass"
        for number in [r.id for r in waiting if stored[r.id]]:
            assert requests[number].stored == 0 and requests[number].pages == ()
            stored[number] = 0  # sent back: it will be computed again
        assert not running or min(running) in seen, "the oldest goes on"
        short = any(table.num_free(w) == 0 for w in range(workers)) or batcher.num_sent_back > sent_back
        if running - set(seen) and not short:
            full = len(composed) == micro_batches and all(m.num_rows == limit for m in composed)
            assert full, "a running request stood still though there were rows"
        sampled = []
        for index, micro_batch in enumerate(composed):
            check_rows(micro_batch, index, workers, limit)
            for piece in micro_batch.pieces:
                assert piece.request.stored == stored[piece.request.id]
                stored[piece.request.id] += piece.num_rows
                assert stored[piece.request.id] <= len(piece.request.pages) * 8
            wanted = sum(span.sample is not None for span in micro_batch.token_batch(index).spans)
            sampled.append(Result(tuple(random.choice([1, 2, EOS]) for _ in range(wanted))))
        finished += batcher.commit(composed, sampled)
    assert sorted(r.id for r in finished) == list(range(len(prompts)))
    assert table.used_pages == 0
    for done in finished:
        assert 1 <= done.num_generated <= done.params.max_tokens
        assert (done.tokens[-1] == EOS) == (done.finish_reason == "stop") or done.tokens[-1] == EOS
        assert stored[done.id] == len(done.tokens) - 1, "all but the last token are stored"


def test_a_long_prompt_comes_in_chunks() -> None:
    batcher = Batcher(PageTable(40, 8, 1), 4, 1, 16, spread=False)
    waiting = queue([request(0, 40, 2)])
    rows = []
    while waiting or batcher.running:
        (micro_batch,) = batcher.compose(waiting)
        batch = micro_batch.token_batch(0)
        rows.append([(s.position, s.num_rows, s.prefill, s.sample is not None) for s in batch.spans])
        batcher.commit([micro_batch], [Result((1,) * sum(s.sample is not None for s in batch.spans))])
    assert rows == [
        [(0, 16, True, False)],
        [(16, 16, False, False)],
        [(32, 8, False, True)],
        [(40, 1, False, True)],
    ]


def test_a_long_prompt_is_not_starved_by_short_ones() -> None:
    batcher = Batcher(PageTable(4000, 8, 1), 64, 2, 64, spread=True)
    waiting = queue([request(0, 300, 2), *(request(i, 9, 40) for i in range(1, 200))])
    passes = 0
    while any(r.id == 0 for r in waiting) or 0 in batcher.running:
        composed = batcher.compose(waiting)
        batcher.commit(composed, [Result((1,) * sum(p.completes for p in m.pieces)) for m in composed])
        passes += 1
    assert passes < 12


def test_a_finished_sequence_is_replaced_in_the_next_pass() -> None:
    batcher = Batcher(PageTable(40, 8, 1), 1, 1, 16, spread=False)
    waiting = queue([request(0, 3, 1), request(1, 3, 1)])
    first = batcher.compose(waiting)
    batcher.commit(first, [Result((1,))])
    second = batcher.compose(waiting)
    assert [piece.request.id for piece in second[0].pieces] == [1]


def test_spread_fills_micro_batches_evenly() -> None:
    waiting = queue(request(i, 4, 1) for i in range(6))
    batcher = Batcher(PageTable(40, 8, 1), 8, 3, 64, spread=True)
    assert [m.num_rows for m in batcher.compose(waiting)] == [8, 8, 8]


def test_short_answers_let_more_run_at_once_and_long_ones_send_the_youngest_back() -> None:
    """At first whole lives are reckoned with; when answers turn out short, more are admitted; when they are long after
    all, the youngest wait."""
    table = PageTable(40, 8, 1)
    batcher = Batcher(table, 64, 1, 64, spread=False)
    waiting = queue(request(i, 8, 100) for i in range(400))
    most, finished = [], 0
    while finished < 300:
        composed = batcher.compose(waiting)
        most.append(len(batcher.running))
        results = [
            Result(tuple(EOS if p.request.num_generated > 3 else 1 for p in m.pieces if p.completes)) for m in composed
        ]
        finished += len(batcher.commit(composed, results))
    assert most[0] == 2 and max(most) > 8 and batcher.num_sent_back == 0
    ended: list[int] = []
    while waiting or batcher.running:
        composed = batcher.compose(waiting)
        results = [Result((1,) * sum(p.completes for p in m.pieces)) for m in composed]
        ended += [r.id for r in batcher.commit(composed, results)]
    assert batcher.num_sent_back > 0
    assert table.used_pages == 0 and len(ended) == 400 - finished

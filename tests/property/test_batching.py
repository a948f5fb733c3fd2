"""Passes composed from random requests: every token computed once and in order, limits kept, everything ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.memory.kv_groups import pages_for
from flexgen_lite.queue.batching import Batcher
from flexgen_lite.queue.kept_logprobs import KeptLogprobs
from flexgen_lite.queue.micro_batch import MicroBatch, Piece, Result
from flexgen_lite.queue.page_table import PageTable
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.queue.waiting_queue import WaitingQueue
from flexgen_lite.wire.arena_specs import KvGroup
from flexgen_lite.wire.sampling import TokenLogprobs, WireParams
from tests.kv_groups import one_group

EOS = 7
GROUPS = (
    one_group(8),
    one_group(8, window=11),
    (KvGroup((0,), 8), KvGroup((1,), 8, window=5)),
    (KvGroup((0,), 8, window=20), KvGroup((1,), 8, window=20), KvGroup((2,), 16)),
    (KvGroup((0,), 8), KvGroup((1,), 8, attention_chunk=12)),
)


def request(number: int, prompt: int, max_tokens: int, kind: int | None = None) -> RunningRequest:
    """Prompts of the same kind begin alike; each is its own kind if nothing is said."""
    params = WireParams(max_tokens, 0, 0.0, 0, 1.0, None, (), False, True)
    first = 1000 + (number if kind is None else -kind)
    return RunningRequest(number, [first] * prompt, prompt, params, seed=0, end_ids=frozenset({EOS}))


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


class Memory:
    """What the places of the KV pages hold: all tokens up to the one whose K and V are there."""

    def __init__(self, groups: tuple[KvGroup, ...]) -> None:
        self._groups = groups
        self._held: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}

    def check(self, piece: Piece) -> None:
        """What it sees of its past is there before the pass begins."""
        tokens, stored = tuple(piece.request.tokens), piece.request.stored
        for index, group in enumerate(self._groups):
            for position in range(group.first_seen(stored), stored):
                held = self._held[self._place(piece, index, position)]
                assert held == (index, tokens[: position + 1]), "another token's K and V"

    def store(self, piece: Piece) -> None:
        tokens, first = tuple(piece.request.tokens), piece.request.stored
        for index in range(len(self._groups)):
            for position in range(first, first + piece.num_rows):
                self._held[self._place(piece, index, position)] = index, tokens[: position + 1]

    def _place(self, piece: Piece, index: int, position: int) -> tuple[int, int]:
        run, (page, within) = piece.request.pages[index], divmod(position, self._groups[index].page_tokens)
        assert page >= run.first, "behind its window"
        return run.pages[page - run.first], within


class States:
    """What the places of the sequences' states hold: all tokens up to the one that was computed last."""

    def __init__(self, count: int) -> None:
        self._held: list[tuple[int, ...]] = [()] * 2 * count

    def check(self, piece: Piece) -> None:
        """The state that it goes on from is there, and it is left as it is."""
        source, target = piece.request.state_places
        assert source != target >= 0 and (source == -1) == piece.prefill
        assert source == -1 or self._held[source] == tuple(piece.request.tokens[: piece.request.stored])

    def write(self, piece: Piece, is_lost: bool = False) -> None:
        """With `is_lost`, a pass that was given up wrote something."""
        count = piece.request.stored + piece.num_rows
        self._held[piece.request.state_places[1]] = (-1,) if is_lost else tuple(piece.request.tokens[:count])


def check_states(batcher: Batcher, count: int) -> None:
    """No two running sequences have the same."""
    found = [running.state for running in batcher.running.values()]
    assert len(set(found)) == len(found) and set(found) <= set(range(count))


@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 6), st.integers(0, 3) | st.none()), min_size=1, max_size=25
    ),
    pages=st.integers(12, 40),
    groups=st.sampled_from(GROUPS),
    workers=st.integers(1, 3),
    max_sequences=st.integers(1, 12),
    micro_batches=st.integers(1, 4),
    tokens=st.integers(12, 40),
    spread=st.booleans(),
    least_gain=st.sampled_from([0, 20, 1000]),
    has_states=st.booleans(),
    random=st.randoms(use_true_random=False),
)
def test_every_request_is_served(
    prompts, pages, groups, workers, max_sequences, micro_batches, tokens, spread, least_gain, has_states, random
) -> None:  # type: ignore[no-untyped-def]
    pages = max(pages * len(groups), pages_for(groups, 66, tokens))
    table = PageTable(pages * workers, groups, workers)
    num_states = max_sequences if has_states else 0
    limits = max_sequences, micro_batches, tokens, spread
    batcher = Batcher(table, *limits, share=not has_states, least_gain=least_gain, num_states=num_states)
    states = States(num_states)
    requests = [request(i, *prompt) for i, prompt in enumerate(prompts)]
    memory = Memory(groups)
    waiting = queue(requests)
    finished: list[RunningRequest] = []
    stored: Counter[int] = Counter()
    limit = tokens
    while waiting or batcher.running:
        if random.random() < 0.05:  # passes turned out to be too large
            limit = batcher.limit_rows(random.randint(1, limit))
        if has_states and random.random() < 0.1:  # a worker is lost in the middle of a pass
            for piece in [piece for micro_batch in batcher.compose(waiting) for piece in micro_batch.pieces]:
                states.write(piece, is_lost=True)
        running, preempted = set(batcher.running), batcher.num_preempted
        composed = batcher.compose(waiting)
        assert composed, "requests wait or run, but the pass is empty"
        assert len(composed) <= micro_batches and len(batcher.running) <= max_sequences
        pieces = [piece for micro_batch in composed for piece in micro_batch.pieces]
        for piece in pieces:
            memory.check(piece)
            if piece.request.id not in running:
                stored[piece.request.id] = piece.request.stored  # by others, who began alike
        if has_states:
            check_states(batcher, num_states)
            for piece in pieces:
                states.check(piece)
                states.write(piece)
        for piece in pieces:
            memory.store(piece)
        seen = [piece.request.id for piece in pieces]
        assert len(seen) == len(set(seen)), "a request rides once in a pass"
        for number in [r.id for r in waiting if stored[r.id]]:
            assert requests[number].stored == 0 and requests[number].pages == ()
            stored[number] = 0  # preempted: it will be computed again
        assert not running or min(running) in seen, "the oldest goes on"
        step = pages_for(groups, 1)
        short = any(table.num_free(w) < step for w in range(workers)) or batcher.num_preempted > preempted
        if running - set(seen) and not short:
            full = len(composed) == micro_batches and all(m.num_rows == limit for m in composed)
            assert full, "a running request stood still though there were rows"
        sampled = []
        for index, micro_batch in enumerate(composed):
            check_rows(micro_batch, index, workers, limit)
            for piece in micro_batch.pieces:
                assert piece.request.stored == stored[piece.request.id]
                stored[piece.request.id] += piece.num_rows
                for group, run in zip(groups, piece.request.pages, strict=True):
                    assert stored[piece.request.id] <= (run.first + len(run.pages)) * group.page_tokens
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
    batcher = Batcher(PageTable(40, one_group(8), 1), 4, 1, 16, spread=False)
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
    batcher = Batcher(PageTable(4000, one_group(8), 1), 64, 2, 64, spread=True)
    waiting = queue([request(0, 300, 2), *(request(i, 9, 40) for i in range(1, 200))])
    passes = 0
    while any(r.id == 0 for r in waiting) or 0 in batcher.running:
        composed = batcher.compose(waiting)
        batcher.commit(composed, [Result((1,) * sum(p.completes for p in m.pieces)) for m in composed])
        passes += 1
    assert passes < 12


@pytest.mark.parametrize("seed", range(25))
def test_a_long_prompt_does_not_stand_still_for_those_who_come_later(seed: int) -> None:
    """Its next chunks need pages before its window passes: these are reckoned with when others are admitted."""
    random = Random(seed)
    window, rows, prompt = random.choice([16, 24]), random.choice([16, 32]), random.randint(100, 400)
    groups = (KvGroup((0,), 8), *(KvGroup((number,), 8, window=window) for number in range(1, random.randint(4, 6))))
    table = PageTable(pages_for(groups, prompt + 2, rows) + random.randint(5, 15), groups, 1)
    batcher = Batcher(table, rows, 1, rows, spread=False)
    size, most, number = random.randint(3, 30), random.randint(20, 80), random.randint(20, 60)
    requests = [request(i, prompt, 2) if i == number else request(i, size, most) for i in range(400)]
    waiting, ends, began = queue(requests), 0.5, False
    for passes in range(1, 800):
        composed = batcher.compose(waiting)
        riding = {piece.request.id for micro_batch in composed for piece in micro_batch.pieces}
        began |= number in riding
        if began and number not in batcher.running:
            return
        assert number in riding or not began
        results = [tuple(EOS if random.random() < ends else 1 for p in m.pieces if p.completes) for m in composed]
        batcher.commit(composed, [Result(tokens) for tokens in results])
        ends = random.choice([0.0, 0.0, 0.5]) if passes % 40 == 0 else ends
    raise AssertionError("it has not ended")


def test_a_finished_sequence_is_replaced_in_the_next_pass() -> None:
    batcher = Batcher(PageTable(40, one_group(8), 1), 1, 1, 16, spread=False)
    waiting = queue([request(0, 3, 1), request(1, 3, 1)])
    first = batcher.compose(waiting)
    batcher.commit(first, [Result((1,))])
    second = batcher.compose(waiting)
    assert [piece.request.id for piece in second[0].pieces] == [1]


def test_spread_fills_micro_batches_evenly() -> None:
    waiting = queue(request(i, 4, 1) for i in range(6))
    batcher = Batcher(PageTable(40, one_group(8), 1), 8, 3, 64, spread=True)
    assert [m.num_rows for m in batcher.compose(waiting)] == [8, 8, 8]


def test_short_answers_let_more_run_at_once_and_long_ones_send_the_youngest_back() -> None:
    """At first whole lives are reckoned with; when answers turn out short, more are admitted; when they are long after
    all, the youngest wait."""
    table = PageTable(40, one_group(8), 1)
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
    assert most[0] == 2 and max(most) > 8 and batcher.num_preempted == 0
    ended: list[int] = []
    while waiting or batcher.running:
        composed = batcher.compose(waiting)
        results = [Result((1,) * sum(p.completes for p in m.pieces)) for m in composed]
        ended += [r.id for r in batcher.commit(composed, results)]
    assert batcher.num_preempted > 0
    assert table.used_pages == 0 and len(ended) == 400 - finished


def rows_by_pass(batcher: Batcher, waiting: WaitingQueue) -> list[dict[int, tuple[int, int]]]:
    """(first position, rows) of each request, pass by pass, until all is done."""
    passes = []
    while waiting or batcher.running:
        composed = batcher.compose(waiting)
        pieces = [piece for micro_batch in composed for piece in micro_batch.pieces]
        passes.append({piece.request.id: (piece.request.stored, piece.num_rows) for piece in pieces})
        batcher.commit(composed, [Result((1,) * sum(p.completes for p in m.pieces)) for m in composed])
    return passes


def test_prompts_that_begin_alike_are_computed_once() -> None:
    """The others wait for the pages of the first; one that is different does not."""
    batcher = Batcher(PageTable(40, one_group(8), 1), 8, 1, 64, spread=False)
    waiting = queue([request(0, 20, 1, kind=1), request(1, 20, 1, kind=1), request(2, 30, 1, kind=1), request(3, 9, 1)])
    assert rows_by_pass(batcher, waiting) == [{0: (0, 20), 3: (0, 9)}, {1: (16, 4), 2: (16, 14)}]
    assert batcher.num_shared == 32


def test_a_little_that_is_alike_is_not_waited_for() -> None:
    batcher = Batcher(PageTable(40, one_group(8), 1), 8, 1, 64, spread=False)
    waiting = queue([request(0, 9, 1, kind=1), request(1, 30, 1, kind=1), request(2, 12, 1, kind=1)])
    assert rows_by_pass(batcher, waiting) == [{0: (0, 9), 1: (0, 30)}, {2: (8, 4)}]


def test_no_prompt_waits_for_a_gain_that_is_smaller_than_a_pass() -> None:
    batcher = Batcher(PageTable(80, one_group(8), 1), 8, 1, 64, spread=False, least_gain=33)
    waiting = queue([request(i, 20, 1, kind=1) for i in range(3)])
    assert rows_by_pass(batcher, waiting) == [{0: (0, 20), 1: (0, 20), 2: (0, 20)}]
    waiting = queue([request(i, 20, 1, kind=2) for i in range(4)])
    assert rows_by_pass(batcher, waiting) == [{0: (0, 20)}, {1: (16, 4), 2: (16, 4), 3: (16, 4)}]


def test_nothing_is_shared_if_so_said() -> None:
    batcher = Batcher(PageTable(40, one_group(8), 1), 8, 1, 64, spread=False, share=False)
    waiting = queue([request(0, 20, 1, kind=1), request(1, 20, 1, kind=1)])
    assert rows_by_pass(batcher, waiting) == [{0: (0, 20), 1: (0, 20)}]


def test_the_last_token_is_always_computed() -> None:
    batcher = Batcher(PageTable(40, one_group(8), 1), 8, 1, 64, spread=False)
    waiting = queue([request(0, 16, 1, kind=1), request(1, 16, 1, kind=1)])
    assert rows_by_pass(batcher, waiting) == [{0: (0, 16)}, {1: (8, 8)}]


def test_of_what_is_only_scored_a_row_is_left() -> None:
    """Its last token is not computed, so the pages may hold all that is: an answer without a score, of several."""
    batcher = Batcher(PageTable(40, one_group(8), 1), 8, 1, 64, spread=False)
    waiting = queue([request(0, 17, 0, kind=1), request(1, 17, 0, kind=1)])
    assert rows_by_pass(batcher, waiting) == [{0: (0, 16)}, {1: (8, 8)}]


def test_tokens_whose_logprobs_are_wanted_are_computed() -> None:
    """Those of a continuation, in logits of the tokens before them."""
    batcher = Batcher(PageTable(40, one_group(8), 1), 8, 1, 128, spread=False)
    scored = [request(i, 40, 0, kind=1) for i in range(3)]
    for one, first in zip(scored, (30, 25, 1), strict=True):
        one.params = replace(one.params, prompt_logprobs=0, scored_from=first)
        one.prompt_logprobs = KeptLogprobs(0)
    waiting, found = queue(scored), []
    while waiting or batcher.running:
        composed = batcher.compose(waiting)
        results = []
        for micro_batch in composed:
            wanted = [p.scored for _, p in micro_batch.in_rows() if p.scored is not None]
            found.append(
                {p.request.id: (p.request.stored, len(p.scored.targets)) for p in micro_batch.pieces if p.scored}
            )
            count = sum(len(scored.targets) for scored in wanted)
            results.append(Result((), (), (TokenLogprobs(-1.0, 1, ()),) * count))
        batcher.commit(composed, results)
    assert found == [{0: (0, 10), 2: (0, 39)}, {1: (24, 15)}]


def test_a_prompt_goes_where_its_beginning_is_unless_that_worker_has_much_more_to_do() -> None:
    table = PageTable(2000, one_group(8), 2)
    batcher = Batcher(table, 200, 1, 4000, spread=False)
    waiting = queue(request(i, 40, 50, kind=1) for i in range(60))
    workers: Counter[int] = Counter()
    computed = 0
    while waiting or batcher.running:
        composed = batcher.compose(waiting)
        for piece in (piece for micro_batch in composed for piece in micro_batch.pieces):
            if piece.request.num_generated == 0:
                workers[piece.request.worker] += 1
                computed += piece.request.stored == 0
        batcher.commit(composed, [Result((1,) * sum(p.completes for p in m.pieces)) for m in composed])
    assert computed == 2, "once on each worker"
    assert abs(workers[0] - workers[1]) <= 8

"""What rides on the next pass: running sequences, the prompts that take the place of finished ones, and how they are
packed into micro-batches. Pure logic.

Prefill and decode are properties of a sequence, not phases of the engine: a pass carries one token of every sequence
whose prompt is stored, and prompts (or the next chunk of a long one) as far as tokens, pages and places allow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from heapq import heappop, heappush

from flexgen_lite.queue.expected_life import ExpectedLife
from flexgen_lite.queue.kv_on_disk import KvOnDisk
from flexgen_lite.queue.micro_batch import MicroBatch, Piece, Result
from flexgen_lite.queue.page_table import PageTable, block_keys, num_pages
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.queue.waiting_queue import Waiting
from flexgen_lite.wire.arena_specs import PageRun
from flexgen_lite.wire.kv_on_disk import KvMoved
from flexgen_lite.wire.sampling import NO_TOKEN

STATE_PARTS = (256, 64)  # rows in which mixers of Mamba 2, and of gated delta nets, go through a prompt
MOST_UNEVEN = 4  # requests' pages that a worker may have more than another because it has the beginning of a prompt


@dataclass(frozen=True, slots=True)
class _Load:
    """By attention worker: pages that are used or expected to be, and keys of prompts that are being computed."""

    pages: list[int]
    keys: list[set[bytes]]


class Batcher:
    """Composes passes and commits their results.

    A request is admitted if what it is expected to hold has room beside what the running ones are (`ExpectedLife`). It
    gets pages as it grows; where there are none left, the youngest sequences of the same worker are preempted: they
    wait, and are computed again from their tokens later. The oldest always goes on, so there is no deadlock.

    With `disk`, what they have is written there, and read when there is room again. Their pages are free once they are
    written; who needs them sits out, so a pass may be empty while something is on its way. Requests that are being read
    are among the running ones.

    Prompts that begin alike share the pages of their beginning, once those are stored.

    Args:
        pages: the KV pages.
        max_sequences: most requests running at once.
        micro_batches: most micro-batches of a pass.
        micro_batch_tokens: most rows of a micro-batch.
        spread: use as many micro-batches as there are, evenly filled, so that lanes overlap; else as few as will do.
        share: whether prompts do.
        least_gain: rows, for fewer no prompt waits for the beginning of another.
        num_states: sequences that there is room for the state of, as many as may run; 0: the model has none.
        disk: where sequences are parked, and beginnings of prompts stored; of the same pages.
    """

    def __init__(
        self,
        pages: PageTable,
        max_sequences: int,
        micro_batches: int,
        micro_batch_tokens: int,
        spread: bool,
        share: bool = True,
        least_gain: int = 0,
        num_states: int = 0,
        disk: KvOnDisk | None = None,
    ) -> None:
        if max_sequences > micro_batches * micro_batch_tokens:
            raise ValueError(
                f"max_sequences {max_sequences} exceeds the {micro_batches} x {micro_batch_tokens} rows of a pass"
            )
        self._pages = pages
        self._max_sequences = max_sequences
        self._micro_batches = micro_batches
        self._micro_batch_tokens = micro_batch_tokens
        self._spread = spread
        self._share, self._least_gain = share, least_gain
        self._has_states, self._states = num_states > 0, list(range(num_states))  # those that are free
        self.disk = disk
        self._is_short = False  # a request of the present pass sits out until pages are written
        self.expected_life = ExpectedLife(pages, max_sequences, disk)
        self.running: dict[int, RunningRequest] = {}
        self.num_preempted = 0
        self.num_shared = 0  # tokens that were not computed, as others had stored them

    @property
    def block_tokens(self) -> int:
        """Of the blocks that prompts share; 0 where they share none."""
        return self._pages.block_tokens if self._share else 0

    def limit_rows(self, rows: int) -> int:
        """A micro-batch has at most so many rows from now on, if that is fewer than before; at least one."""
        self._micro_batch_tokens = max(1, min(rows, self._micro_batch_tokens))
        return self._micro_batch_tokens

    def compose(self, waiting: Waiting, only: frozenset[int] | None = None) -> list[MicroBatch]:
        """The micro-batches of the next pass, taking requests from `waiting`; empty if there is no work.
        With `only`, nothing but these running requests, and none before all of them have what they need."""
        bins = [MicroBatch() for _ in range(self._micro_batches)]
        preempted, self._is_short = self.num_preempted, False
        if only is None:
            self._make_room_ahead(waiting)
        running = sorted(
            (r for r in self.running.values() if not r.moving and (only is None or r.id in only)), key=lambda r: r.id
        )
        placed: set[int] = set()
        order = sorted(running, key=lambda r: r.num_left > 1)  # the rest of long prompts comes last
        if len(running) > self._micro_batches * self._micro_batch_tokens:  # after `limit_rows`: the oldest goes on
            order.sort(key=lambda request: request.id)
        for request in order:
            rows = min(request.num_left, self._most_room(bins))
            if rows and request.id in self.running and self._has_pages(request, rows, placed, waiting, only is None):
                self._place(bins, request, rows)
                placed.add(request.id)
        if only is None and self.num_preempted == preempted and not self._is_short:
            self._admit(bins, waiting)
        if only is not None and (self._is_short or any(r.moving for r in self.running.values() if r.id in only)):
            return []
        return [micro_batch for micro_batch in bins if micro_batch.pieces]

    def _make_room_ahead(self, waiting: Waiting) -> None:
        """Parks the youngest where there are not the pages for this pass and the next one, so that nobody has to sit
        out until they are written."""
        table = self._pages
        if self.disk is None:
            return
        for worker in range(table.num_workers):
            here = sorted((r for r in self.running.values() if r.worker == worker and not r.moving), key=lambda r: r.id)
            room = table.num_free(worker) + self.disk.coming(worker)
            needed = [table.needed(r.id, r.stored, r.stored_in_two_passes(self._micro_batch_tokens)) for r in here]
            while sum(needed) > room and len(here) > 1:
                victim = here.pop()
                needed.pop()
                if not self.disk.can_park(victim):
                    break
                room += table.num_own(victim.id)
                self._preempt(victim, waiting, park=True)

    def _has_pages(self, request: RunningRequest, rows: int, placed: set[int], waiting: Waiting, park: bool) -> bool:
        """Sees to it that the next rows have pages, at the cost of younger sequences if need be."""
        table, worker = self._pages, request.worker
        while True:
            pages = table.grow(request.id, request.stored, request.stored + rows)
            if pages is not None:
                request.pages = pages
                return True
            request.pages = table.pages_of(request.id)  # without those behind its window
            coming = self.disk.coming(worker) if self.disk is not None else 0
            missing = table.needed(request.id, request.stored, request.stored + rows) - table.num_free(worker)
            if 0 < missing <= coming:
                self._is_short = True
                return False  # until they are written
            here = (r for r in self.running.values() if r.worker == worker and r.id not in placed)
            younger = [r for r in here if r.id > request.id]
            if not younger:
                return False  # those that are in the pass will end
            self._preempt(max(younger, key=lambda r: r.id), waiting, park)

    def _preempt(self, request: RunningRequest, waiting: Waiting, park: bool) -> None:
        """A running request waits; with `park` what it has is written to disk, if that is worth it."""
        del self.running[request.id]
        if self.disk is not None and request.moving:
            self.disk.leave(request, is_gone=False)
        elif self.disk is None or not park or not self.disk.park(request):
            self._free(request)
        self._stop(request)
        request.times_preempted += 1
        self.num_preempted += 1
        self.expected_life.preempted()
        waiting.put_back(request)

    def _admit(self, bins: list[MicroBatch], waiting: Waiting) -> None:
        """Takes requests from `waiting` as far as rows, places and pages go."""
        held, gain = self._take_from(waiting, bins, hold=True)
        for request in reversed(held):
            waiting.put_back(request)
        if held and gain < self._least_gain:
            self._take_from(waiting, bins, hold=False)

    def _take_from(self, waiting: Waiting, bins: list[MicroBatch], hold: bool) -> tuple[list[RunningRequest], int]:
        """With `hold`, a request that begins as a prompt does which is not stored yet is left out, if another pass will
        halve its rows at least. Returns those, and how many rows that saves."""
        table = self._pages
        load = _Load([table.num_used(w) for w in range(table.num_workers)], [set() for _ in range(table.num_workers)])
        for running in self.running.values():
            load.pages[running.worker] += max(0, self._expected_pages(running) - num_pages(running.pages))
            if running.stored < running.num_prompt_tokens:
                load.keys[running.worker].update(self._keys(running))
        held: list[RunningRequest] = []
        gain = 0
        while len(self.running) + len(held) < self._max_sequences and (request := waiting.first()) is not None:
            if request.moving or (self._has_states and not self._states):
                break
            if request.parked is not None:
                if not self._bring_back(waiting, load):
                    break
                continue
            needed = self._expected_pages(request)
            worker, num_coming = self._choose(request, needed, load)
            keys = self._sharable(request)
            shared = keys[: table.find(worker, keys)]
            stored, room = len(shared) * table.block_tokens, self._most_room(bins)
            rows = request.num_left - stored
            assert rows > 0, "a request without a row never ends"
            saved = (num_coming - len(shared)) * table.block_tokens
            if hold and 2 * saved >= rows:
                held.append(waiting.take())
                gain += saved
                continue
            if rows > room and (rows <= self._micro_batch_tokens or room == 0):
                break
            more = needed - table.num_shared(worker, shared)
            if load.pages[worker] and load.pages[worker] + more > table.size(worker):
                break
            used = table.num_used(worker)
            end = len(shared) if self.disk is None else self.disk.find_prefix(keys, len(shared))
            pages = None
            if self.disk is not None and end > len(shared):  # it runs once they are read
                last = end * table.block_tokens
                next_rows = min(request.num_left - last, self._micro_batch_tokens)
                pages = table.allocate(request.id, worker, request.num_left, next_rows, shared, last)
                if pages is not None:
                    self.disk.fetch_prefix(request, worker, pages, keys[:end], len(shared))
            if pages is None:
                pages = table.allocate(request.id, worker, request.num_left, min(rows, room), shared)
            if pages is None:
                break
            load.keys[worker].update(self._keys(request))
            load.pages[worker] += table.num_used(worker) - used + max(0, needed - num_pages(pages))
            request.stored = stored
            self.num_shared += stored
            self._begin(waiting, worker, pages)
            if not request.moving:
                self._place(bins, request, rows)
        return held, gain

    def _begin(self, waiting: Waiting, worker: int, pages: tuple[PageRun, ...]) -> None:
        """The first that waits runs from now on."""
        request = waiting.take()
        request.worker, request.pages = worker, pages
        if self._has_states:
            request.state, request.half = heappop(self._states), 0
        self.running[request.id] = request

    def _bring_back(self, waiting: Waiting, load: _Load) -> bool:
        """The first that waits, which is parked, gets pages and is read, if there is room for the rest of its life."""
        request, table = waiting.first(), self._pages
        assert request is not None and request.parked is not None and self.disk is not None
        stored, needed = request.parked.stored, self._expected_pages(request)
        worker = self._choose(request, needed, load)[0]
        keys = self._keys(request)[: stored // table.block_tokens]
        shared = keys[: table.find(worker, keys)]
        if load.pages[worker] and load.pages[worker] + needed > table.size(worker):
            return False
        used, rows = table.num_used(worker), max(1, min(request.num_left - stored, self._micro_batch_tokens))
        pages = table.allocate(request.id, worker, request.num_left, rows, shared, stored)
        if pages is None:
            return False
        load.pages[worker] += table.num_used(worker) - used + max(0, needed - num_pages(pages))
        self._begin(waiting, worker, pages)
        self.disk.fetch(request, worker, pages, len(shared) * table.block_tokens)
        return True

    def moved(self, message: KvMoved, waiting: Waiting) -> RunningRequest | None:
        """The loader has written or read something. Returns a request that was to run, and waits again: it could not
        be read."""
        assert self.disk is not None, "nothing was ordered"
        landed = self.disk.moved(message)
        if landed is None or landed.has_pages:
            return None
        request = landed.request
        if landed.state >= 0:
            heappush(self._states, landed.state)
        if self.running.pop(request.id, None) is None:
            return None
        self._stop(request)
        waiting.put_back(request)
        return request

    def _choose(self, request: RunningRequest, needed: int, load: _Load) -> tuple[int, int]:
        """(worker, blocks that it has or will have of what the request can share): the worker with the least to do, or
        one that has more of it, if that has not much more to do."""
        table, keys = self._pages, self._sharable(request)
        least = min(range(table.num_workers), key=lambda w: load.pages[w] / table.size(w))
        best, most = least, 0
        for worker in (least, *range(table.num_workers)):
            coming = load.keys[worker]
            count = table.find(worker, keys)
            while count < len(keys) and keys[count] in coming:
                count += 1
            if count > most and load.pages[worker] - load.pages[least] <= MOST_UNEVEN * needed:
                best, most = worker, count
        return best, most

    def _sharable(self, request: RunningRequest) -> tuple[bytes, ...]:
        """Keys of the blocks that it may have from others."""
        return self._keys(request)[: request.most_shared // self._pages.block_tokens]

    def _keys(self, request: RunningRequest) -> tuple[bytes, ...]:
        """Of the prompt's full blocks."""
        if request.block_keys is None:
            size = self._pages.block_tokens
            count = request.num_prompt_tokens // size if self._share else 0
            request.block_keys = block_keys(request.tokens, size, count)
        return request.block_keys

    def _expected_pages(self, request: RunningRequest) -> int:
        left = request.num_left - (request.parked.stored if request.parked is not None else 0)
        rows = max(1, min(left, self._micro_batch_tokens))  # of its prompt, in a pass
        return self._pages.pages_for(self.expected_life.tokens(request), rows)

    def commit(self, micro_batches: list[MicroBatch], results: list[Result]) -> list[RunningRequest]:
        """The pass is over: take its tokens, `results[k]` in the order of micro-batch k's rows; the requests that it
        completed, their pages freed."""
        finished = []
        for micro_batch, result in zip(micro_batches, results, strict=True):
            sampled, logprobs = iter(result.token_ids), iter(result.logprobs)
            scores = iter(result.prompt_logprobs)
            for _, piece in micro_batch.in_rows():
                request, completes, scored = piece.request, piece.completes, piece.scored
                if scored is not None and request.prompt_logprobs is not None:
                    for _ in scored.targets:
                        found = next(scores)
                        request.prompt_logprobs.append(found)
                        request.overflowed |= math.isnan(found.logprob)
                if completes:
                    token = next(sampled)
                    request.overflowed |= token == NO_TOKEN
                    if request.logprobs is not None:
                        request.logprobs.append(next(logprobs))
                    if not request.overflowed:
                        request.add(token)
                if request.stored < request.num_prompt_tokens:
                    stored = min(request.stored + piece.num_rows, request.num_prompt_tokens)
                    keys = self._keys(request)[: stored // self._pages.block_tokens]
                    self._pages.publish(request.id, keys)
                    if self.disk is not None:
                        self.disk.offer(request.worker, keys)
                request.stored += piece.num_rows
                request.half ^= 1
                if request.finish_reason is not None or request.overflowed:
                    finished.append(request)
        for request in finished:
            self.expected_life.ended(request)
            self.release(request)
        return finished

    def release(self, request: RunningRequest) -> None:
        """The request runs no more."""
        del self.running[request.id]
        if self.disk is not None and request.moving:
            self.disk.leave(request, is_gone=True)
        else:
            self._free(request)

    def forget(self, request: RunningRequest) -> None:
        """A request that waited is over."""
        if self.disk is not None:
            self.disk.forget(request)

    def _free(self, request: RunningRequest) -> None:
        self._pages.release(request.id)
        if request.state >= 0:
            heappush(self._states, request.state)
            request.state = -1

    def _stop(self, request: RunningRequest) -> None:
        """It has nothing any more."""
        request.stored, request.worker, request.pages, request.state = 0, -1, (), -1

    def _cut(self, request: RunningRequest, rows: int) -> int:
        """Rows of a prompt that go on in another pass, where the model has states: such that the parts in which a mixer
        goes through it are the same wherever it is cut, if there is room for one."""
        if not self._has_states or rows >= request.num_left:
            return rows
        return next((rows - (request.stored + rows) % part for part in STATE_PARTS if rows > part), rows)

    def _most_room(self, bins: list[MicroBatch]) -> int:
        return self._micro_batch_tokens - min(b.num_rows for b in bins)

    def _place(self, bins: list[MicroBatch], request: RunningRequest, rows: int) -> None:
        """The request's next rows into a micro-batch: all of them if they fit, else as many as the emptiest takes."""
        rows = self._cut(request, min(rows, self._most_room(bins)))
        if rows == 0:
            return
        fitting = [b for b in bins if b.num_rows + rows <= self._micro_batch_tokens]
        target = min(fitting, key=lambda b: b.num_rows) if self._spread else fitting[0]
        target.add(Piece(request, rows))

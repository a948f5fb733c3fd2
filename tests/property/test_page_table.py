"""The page table against a model of it: sets of pages."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexgen_lite.queue.page_table import PageTable, page_keys


class PageTableMachine(RuleBasedStateMachine):
    @initialize(pages=st.integers(3, 40), page_tokens=st.sampled_from([8, 16]), workers=st.integers(1, 3))
    def make(self, pages: int, page_tokens: int, workers: int) -> None:
        self.table = PageTable(pages, page_tokens, workers)
        self.num_pages = pages
        self.owned: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.held: dict[int, bytes] = {}  # what was written to a page last
        self.next = 0

    @rule(tokens=st.integers(1, 200), kind=st.integers(0, 2))
    def allocate(self, tokens: int, kind: int) -> None:
        """Prompts of a kind begin alike; all of their full pages are published."""
        before = self.table.used_pages
        worker = self.next % self.table.num_workers
        keys = page_keys([kind] * tokens, self.table.page_tokens, tokens // self.table.page_tokens)
        shared = self.table.find(worker, keys)
        assert all(self.held[page] == key for page, key in zip(shared, keys, strict=False))
        pages = self.table.allocate(self.next, tokens, worker, shared)
        if pages is None:
            assert self.table.used_pages == before
            assert self.owned or tokens > self.table.max_tokens, "an empty table holds every sequence up to its limit"
            return
        assert len(pages) == -(-tokens // self.table.page_tokens) and pages[: len(shared)] == shared
        taken = {page for _, others in self.owned.values() for page in others}
        assert not taken & set(pages[len(shared) :]), "a page that somebody has is given to nobody else"
        self.held |= dict.fromkeys(pages[len(shared) :], b"")  # they are written
        self.held |= dict(zip(pages, keys, strict=False))
        self.table.publish(self.next, keys)
        self.owned[self.next] = worker, pages
        self.next += 1

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), tokens=st.integers(1, 300))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.owned)))
        worker, before = self.owned[sequence]
        missing = -(-tokens // self.table.page_tokens) - len(before)
        free = self.table.num_free(worker)
        pages = self.table.grow(sequence, tokens)
        assert (pages is None) == (missing > free)
        if pages is not None:
            assert pages[: len(before)] == before and len(pages) == len(before) + max(0, missing)
            self.held |= dict.fromkeys(pages[len(before) :], b"")
            self.owned[sequence] = worker, pages

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.owned)))
        self.table.release(sequence)
        del self.owned[sequence]

    @invariant()
    def pages_are_counted_once(self) -> None:
        taken = {page for _, pages in self.owned.values() for page in pages}
        assert len(taken) == self.table.used_pages
        assert all(0 <= page < self.num_pages for page in taken)

    @invariant()
    def a_page_belongs_to_one_worker(self) -> None:
        workers: dict[int, int] = {}
        for worker, pages in self.owned.values():
            for page in pages:
                assert workers.setdefault(page, worker) == worker


TestPageTable = PageTableMachine.TestCase


def test_what_was_used_last_stays_longest() -> None:
    table = PageTable(6, 16, 1)
    old, hot = page_keys([1] * 32, 16, 2), page_keys([2] * 32, 16, 2)
    for sequence, keys in enumerate((old, hot, old, hot)):
        table.allocate(sequence, 33, 0, table.find(0, keys))
        table.publish(sequence, keys)
        table.release(sequence)
    assert table.used_pages == 0 and table.num_free(0) == 6
    table.allocate(9, 48, 0)  # two pages were never published, one goes
    assert len(table.find(0, old)) == 1, "the end of a beginning goes first"
    assert len(table.find(0, hot)) == 2


def test_keys_tell_all_tokens_up_to_the_end_of_a_page() -> None:
    ones, other = page_keys([1] * 32, 16, 2), page_keys([2] + [1] * 31, 16, 2)
    assert len({*ones, *other}) == 4
    assert page_keys([1] * 40, 16, 2) == ones


def test_too_few_pages_for_the_workers() -> None:
    with pytest.raises(ValueError, match="1 KV pages for 2 attention workers"):
        PageTable(1, 16, 2)

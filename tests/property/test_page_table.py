"""The page table against a model of it: sets of pages."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexgen_lite.page_table import PageTable


class PageTableMachine(RuleBasedStateMachine):
    @initialize(pages=st.integers(3, 40), page_tokens=st.sampled_from([8, 16]), workers=st.integers(1, 3))
    def make(self, pages: int, page_tokens: int, workers: int) -> None:
        self.table = PageTable(pages, page_tokens, workers)
        self.num_pages = pages
        self.owned: dict[int, tuple[int, tuple[int, ...]]] = {}
        self.next = 0

    @rule(tokens=st.integers(1, 200))
    def allocate(self, tokens: int) -> None:
        before = self.table.used_pages
        worker = self.next % self.table.num_workers
        pages = self.table.allocate(self.next, tokens, worker)
        if pages is None:
            assert self.table.used_pages == before
            assert self.owned or tokens > self.table.max_tokens, "an empty table holds every sequence up to its limit"
            return
        assert len(pages) == -(-tokens // self.table.page_tokens)
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
            self.owned[sequence] = worker, pages

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.owned)))
        self.table.release(sequence)
        del self.owned[sequence]

    @invariant()
    def pages_have_one_owner(self) -> None:
        taken = [page for _, pages in self.owned.values() for page in pages]
        assert len(taken) == len(set(taken)) == self.table.used_pages
        assert all(0 <= page < self.num_pages for page in taken)

    @invariant()
    def a_page_belongs_to_one_worker(self) -> None:
        workers: dict[int, int] = {}
        for worker, pages in self.owned.values():
            for page in pages:
                assert workers.setdefault(page, worker) == worker


TestPageTable = PageTableMachine.TestCase


def test_too_few_pages_for_the_workers() -> None:
    with pytest.raises(ValueError, match="1 KV pages for 2 attention workers"):
        PageTable(1, 16, 2)

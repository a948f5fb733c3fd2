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
        answer = self.table.allocate(self.next, tokens)
        if answer is None:
            assert self.table.used_pages == before
            assert self.owned or tokens > self.table.max_tokens, "an empty table holds every sequence up to its limit"
            return
        assert len(answer[1]) == -(-tokens // self.table.page_tokens)
        self.owned[self.next] = answer
        self.next += 1

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

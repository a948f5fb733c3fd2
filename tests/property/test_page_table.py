"""The page table against a model of it: what each page holds, and who has it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexgen_lite.queue.page_table import Pages, PageTable, block_keys
from flexgen_lite.wire.arena_specs import KvGroup
from tests.kv_groups import one_group

GROUPS = (
    one_group(8),
    one_group(16, window=20),
    (KvGroup((0,), 8), KvGroup((1,), 8, window=9)),
    (KvGroup((0,), 8, window=30), KvGroup((1,), 16), KvGroup((2,), 8, attention_chunk=24)),
)


@dataclass
class Sequence:
    """`prompt` tokens are those of its `kind`; `stored` tokens are in its pages."""

    worker: int
    kind: int
    prompt: int
    keys: tuple[bytes, ...]
    stored: int
    pages: Pages


class PageTableMachine(RuleBasedStateMachine):
    @initialize(pages=st.integers(3, 80), groups=st.sampled_from(GROUPS), workers=st.integers(1, 3))
    def make(self, pages: int, groups: tuple[KvGroup, ...], workers: int) -> None:
        self.table = PageTable(pages, groups, workers)
        self.groups = groups
        self.num_pages = pages
        self.owned: dict[int, Sequence] = {}
        self.held: dict[int, object] = {}  # what was written to a page last
        self.next = 0

    def content(self, number: int, index: int, page: int) -> object:
        """Of a sequence's page: that of all prompts of its kind, or of nobody else."""
        one = self.owned[number]
        is_shared = (page + 1) * self.groups[index].page_tokens <= len(one.keys) * self.table.block_tokens
        return index, page, ("kind", one.kind) if is_shared else ("sequence", number)

    def store(self, number: int, rows: int) -> None:
        """Its next tokens: what they see is there, and so is room for them."""
        one = self.owned[number]
        end = one.stored + rows
        for index, (group, run) in enumerate(zip(self.groups, one.pages, strict=True)):
            size = group.page_tokens
            assert run.first * size <= group.first_seen(one.stored) and (run.first + len(run.pages)) * size >= end
            for page in range(group.first_seen(one.stored) // size, -(-one.stored // size)):
                assert self.held[run.pages[page - run.first]] == self.content(number, index, page)
            for page in range(one.stored // size, -(-end // size)):
                self.held[run.pages[page - run.first]] = self.content(number, index, page)
        one.stored = end
        self.table.publish(number, one.keys[: end // self.table.block_tokens])

    @rule(tokens=st.integers(1, 200), rows=st.integers(1, 60), kind=st.integers(0, 2))
    def allocate(self, tokens: int, rows: int, kind: int) -> None:
        """Prompts of a kind begin alike; all but the last token can be had from others."""
        size, worker = self.table.block_tokens, self.next % self.table.num_workers
        before = self.table.used_pages
        keys = block_keys([kind] * tokens, size, (tokens - 1) // size)
        shared = keys[: self.table.find(worker, keys)]
        rows = min(rows, tokens - len(shared) * size)
        had = self.table.num_shared(worker, shared)
        pages = self.table.allocate(self.next, worker, tokens, rows, shared)
        if pages is None:
            assert self.table.used_pages == before
            fits = self.table.pages_for(tokens, rows) <= self.table.size(worker)
            assert not fits or any(one.worker == worker for one in self.owned.values())
            return
        assert self.table.used_pages == before + num_pages(pages) - had
        self.owned[self.next] = Sequence(worker, kind, tokens, keys, len(shared) * size, pages)
        self.store(self.next, rows)
        self.next += 1

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), rows=st.integers(1, 60))
    def grow(self, data: st.DataObject, rows: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.owned)))
        one = self.owned[number]
        pages = self.table.grow(number, one.stored, one.stored + rows)
        if pages is None:
            alone = all(other is one or other.worker != one.worker for other in self.owned.values())
            fits = self.table.pages_for(max(one.stored + rows, one.prompt), rows) <= self.table.size(one.worker)
            assert not (alone and fits), "one alone can have all pages"
            self.table.release(number)
            del self.owned[number]
            return
        assert num_pages(pages) <= self.table.pages_for(max(one.stored + rows, one.prompt), rows)
        one.pages = pages
        self.store(number, rows)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.owned)))
        self.table.release(number)
        del self.owned[number]

    @invariant()
    def pages_are_counted_once(self) -> None:
        taken = {page for one in self.owned.values() for run in one.pages for page in run.pages}
        assert len(taken) <= self.table.used_pages <= self.num_pages
        assert all(0 <= page < self.num_pages for page in taken)
        if not self.owned:
            assert self.table.used_pages == 0

    @invariant()
    def a_page_belongs_to_one_worker_and_one_group(self) -> None:
        places: dict[int, tuple[int, int]] = {}
        for one in self.owned.values():
            for index, run in enumerate(one.pages):
                for page in run.pages:
                    assert places.setdefault(page, (one.worker, index)) == (one.worker, index)


def num_pages(pages: Pages) -> int:
    return sum(len(run.pages) for run in pages)


TestPageTable = PageTableMachine.TestCase


def test_what_was_used_last_stays_longest() -> None:
    table = PageTable(6, one_group(16), 1)
    old, hot = block_keys([1] * 32, 16, 2), block_keys([2] * 32, 16, 2)
    for sequence, keys in enumerate((old, hot, old, hot)):
        table.allocate(sequence, 0, 33, 33, keys[: table.find(0, keys)])
        table.publish(sequence, keys)
        table.release(sequence)
    assert table.used_pages == 0 and table.num_free(0) == 6
    table.allocate(9, 0, 48, 48)  # two pages were never published, one goes
    assert table.find(0, old) == 1, "the end of a beginning goes first"
    assert table.find(0, hot) == 2


WINDOWED = (KvGroup((0,), 8), KvGroup((1,), 8, window=10))


def test_pages_behind_a_window_are_free() -> None:
    table = PageTable(40, WINDOWED, 1)
    (whole, windowed) = table.allocate(0, 0, 30, 30) or ()
    assert (len(whole.pages), len(windowed.pages), windowed.first) == (4, 4, 0)
    (whole, windowed) = table.grow(0, 30, 31) or ()
    assert (len(whole.pages), len(windowed.pages), windowed.first) == (4, 2, 2) and table.used_pages == 6
    assert table.pages_for(1000) == 125 + 3 and table.max_tokens(rows=1) == (40 - 3) * 8


def test_a_beginning_is_shared_where_its_window_is_there() -> None:
    """A window that has passed is kept for others who begin alike as long as there are pages."""
    table = PageTable(20, WINDOWED, 1)
    keys = block_keys([1] * 32, 8, 4)
    table.allocate(0, 0, 33, 33)
    table.publish(0, keys)
    table.grow(0, 33, 34)
    assert table.find(0, keys) == 4
    table.allocate(1, 0, 60, 28, keys)  # of it: blocks 2 and 3 of the window, to the end
    for begin in (60, 68, 76):
        assert table.grow(1, begin, begin + 1) is not None
    table.release(0)
    assert table.find(0, keys) == 4
    assert table.allocate(2, 0, 80, 8) is None, "there is no room for another"
    assert table.grow(1, 84, 112) is not None
    assert table.find(0, keys) == 0, "now the pages are needed"


def test_keys_tell_all_tokens_up_to_the_end_of_a_block() -> None:
    ones, other = block_keys([1] * 32, 16, 2), block_keys([2] + [1] * 31, 16, 2)
    assert len({*ones, *other}) == 4
    assert block_keys([1] * 40, 16, 2) == ones


def test_too_few_pages_for_the_workers() -> None:
    with pytest.raises(ValueError, match="1 KV pages for 2 attention workers"):
        PageTable(1, one_group(16), 2)

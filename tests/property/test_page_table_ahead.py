"""What the page table says beforehand is what comes; pages that are held stay as they are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.queue.page_table import PageTable, block_keys, num_pages
from tests.kv_groups import one_group
from tests.property.test_batching import GROUPS


@given(
    groups=st.sampled_from(GROUPS),
    steps=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30), st.booleans()), min_size=1, max_size=60),
    alike=st.booleans(),
)
def test_pages_that_growing_takes_are_known_before(groups, steps, alike) -> None:  # type: ignore[no-untyped-def]
    table = PageTable(60, groups, 1)
    stored: dict[int, int] = {}
    for number, rows, ends in steps:
        tokens = [5 if alike else 100 + number] * 1000
        if number not in stored:
            keys = block_keys(tokens, table.block_tokens, 4)
            shared = keys[: table.find(0, keys)]
            begin = len(shared) * table.block_tokens
            if table.allocate(number, 0, begin + rows, rows, shared) is None:
                continue
            stored[number] = begin + rows
            table.publish(number, keys[: stored[number] // table.block_tokens])
            continue
        if ends:
            before, own = table.num_free(0), table.num_own(number)
            table.release(number)
            del stored[number]
            assert table.num_free(0) == before + own
            continue
        before, needed = table.num_free(0), table.needed(number, stored[number], stored[number] + rows)
        if table.grow(number, stored[number], stored[number] + rows) is None:
            after = table.num_free(0)
            assert after < table.needed(number, stored[number], stored[number] + rows)
            continue
        stored[number] += rows
        assert needed >= before - table.num_free(0), "no more than was said"
        if not alike and needed <= before:  # where it is short of pages, those go that it kept for others
            assert needed == max(0, before - table.num_free(0))
    for number in stored:
        table.release(number)
    assert table.used_pages == 0


def test_a_block_that_is_held_stays_when_its_sequence_is_over() -> None:
    table = PageTable(6, one_group(8), 1)
    keys = block_keys([5] * 16, 8, 2)
    pages = table.allocate(0, 0, 16, 16)
    assert pages is not None
    assert table.hold(0, keys[0]) is None, "it is not published"
    table.publish(0, keys)
    held = table.hold(0, keys[0])
    assert held == [(pages[0].pages[0],)] and table.num_held(held) == 0
    table.release(0)
    assert table.used_pages == 1 and table.num_held(held) == 1
    assert table.allocate(1, 0, 48, 48) is None
    others = table.allocate(1, 0, 40, 40)
    assert others is not None and held[0][0] not in others[0].pages
    table.let_go(0, held)
    assert table.used_pages == 5


def test_a_sequence_that_comes_back_has_what_its_next_token_sees() -> None:
    """Of a group with a window no pages before it, though its first blocks are shared."""
    for groups in GROUPS:
        table = PageTable(60, groups, 1)
        keys = block_keys([5] * 200, table.block_tokens, 2)
        table.allocate(0, 0, 40, 40)
        table.publish(0, keys)
        pages = table.allocate(1, 0, 91, 1, keys[: table.find(0, keys)], 90)
        assert pages is not None
        for group, run in zip(groups, pages, strict=True):
            assert run.first * group.page_tokens <= group.first_seen(90) < (run.first + 1) * table.block_tokens + 90
            assert (run.first + len(run.pages)) * group.page_tokens >= 91
        table.release(0)
        assert table.num_used(0) == num_pages(pages)
        table.release(1)
        assert table.used_pages == 0

"""The guilty requests are found, the others are not blamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.queue.poison_requests import TRIES, PoisonRequests


def run(ids: Sequence[int], fails: Callable[[Sequence[int]], bool]) -> tuple[set[int], int]:
    """Passes until nothing fails any more: the requests that were given up, and the passes that it took."""
    poison, left, guilty = PoisonRequests(), list(ids), set[int]()
    for passes in range(10_000):
        group = poison.group
        running = [i for i in left if group is None or i in group]
        while running and fails(running):
            as_it_is, found = poison.failed(running, len(running))
            if found is not None:
                guilty.add(found)
                left.remove(found)
            if not as_it_is:
                break
        else:
            if group is None:
                return guilty, passes
            if running:
                assert not poison.passed() or not guilty, "guilty ones were found: the pass was not too large"
            else:
                poison.skip()
    raise AssertionError("it never ends")


@given(st.integers(1, 100).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), max_size=4))))
def test_exactly_the_guilty_are_given_up(case: tuple[int, set[int]]) -> None:
    count, poison = case
    guilty, _ = run(range(count), lambda ids: not poison.isdisjoint(ids))
    assert guilty == poison


@given(st.integers(2, 100), st.integers(1, 60))
def test_a_pass_that_is_too_much_at_once_is_nobodys_fault(count: int, most: int) -> None:
    poison = PoisonRequests()
    done: set[int] = set()
    too_many = 0
    for _ in range(1000):
        group = poison.group
        running = [i for i in range(count) if group is None or i in group]
        if len(running) > most:
            _, guilty = poison.failed(running, len(running))
            assert guilty is None
        else:
            too_many = poison.passed()
            done |= set(running)
            if poison.group is None:
                break
    assert done == set(range(count))
    assert too_many == (count if count > most else 0)


def test_failures_that_do_not_come_back_change_nothing() -> None:
    poison = PoisonRequests()
    for _ in range(10):
        for _ in range(TRIES - 1):
            assert poison.failed([1, 2, 3], 3) == (True, None)
        poison.passed()
        assert poison.group is None

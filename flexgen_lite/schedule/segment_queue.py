"""Which of the segments that the coordinator has granted the compute worker runs next: pure logic.

    granted, and attention (column - 1, micro-batch) done on every worker  ->  ready
    not granted yet, but that attention done                               ->  may leave column - 1
    ready ones run in the order (column, micro-batch), at most `credit` at a time; if none is ready, one leaves

The coordinator grants a segment when its layer's weights are at hand; that the attention before it is done, the compute
worker hears from the attention workers themselves. To leave a column is to run the part of the segment that needs only
the layer before, whose slot is free for other weights afterwards: all columns of a layer are granted at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


class SegmentQueue:
    """Segments of one pass.

    Args:
        num_workers: attention workers that each micro-batch has rows on.
        credit: segments that may run at a time; 2 on a device that is fed asynchronously.
    """

    def __init__(self, num_workers: Sequence[int], credit: int) -> None:
        self._num_workers = tuple(num_workers)
        self._credit = credit
        self._granted: dict[int, dict[int, int]] = {k: {} for k in range(len(num_workers))}  # k -> column -> slot
        self._next = [0] * len(num_workers)
        self._missing = [0] * len(num_workers)  # attention workers that the next segment waits for
        self._left = [False] * len(num_workers)  # whether the column behind the attention has been left
        self._ready: list[tuple[int, int]] = []
        self._leaving: list[tuple[int, int]] = []
        self._running = 0

    def grant(self, column: int, micro_batch: int, slot: int) -> None:
        self._granted[micro_batch][column] = slot
        self._check(micro_batch)

    def attended(self, column: int, micro_batch: int) -> None:
        """One attention worker has done its part of the micro-batch's attention in `column`."""
        assert column == self._next[micro_batch] - 1 and self._missing[micro_batch] > 0, "attended out of turn"
        self._missing[micro_batch] -= 1
        self._check(micro_batch)

    def take(self) -> tuple[int, int, int | None] | None:
        """(column, micro-batch, slot) of the segment to run now, slot None: only to leave the column before.

        None if there is none.
        """
        if self._running == self._credit:
            return None
        if self._ready:
            column, micro_batch = heapq.heappop(self._ready)
            self._next[micro_batch] = column + 1
            self._missing[micro_batch] = self._num_workers[micro_batch]
            self._left[micro_batch] = False
            self._running += 1
            return column, micro_batch, self._granted[micro_batch].pop(column)
        while self._leaving:
            column, micro_batch = heapq.heappop(self._leaving)
            if column == self._next[micro_batch]:  # it was not granted meanwhile
                self._left[micro_batch] = True
                self._running += 1
                return column, micro_batch, None
        return None

    def done(self) -> None:
        """A segment that was taken has run."""
        self._running -= 1

    def _check(self, micro_batch: int) -> None:
        column = self._next[micro_batch]
        if self._missing[micro_batch] > 0:
            return
        if column not in self._granted[micro_batch]:
            if column > 0 and not self._left[micro_batch] and (column, micro_batch) not in self._leaving:
                heapq.heappush(self._leaving, (column, micro_batch))
        elif (column, micro_batch) not in self._ready:
            heapq.heappush(self._ready, (column, micro_batch))

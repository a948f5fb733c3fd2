"""Slots of a file, and which of them are free: pure logic."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush


class DiskSlots:
    """Slots 0 .. `size` - 1. The lowest free ones are handed out first, so that a file is no longer than it has to be.

    Args:
        size: slots of the file.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: list[int] = []  # a heap, of those that were used before
        self._fresh = 0  # from here on none was ever used
        self._num_lost = 0

    @property
    def num_free(self) -> int:
        return len(self._free) + self.size - self._fresh

    @property
    def num_usable(self) -> int:
        """Free or not: all but those that were lost."""
        return self.size - self._num_lost

    @property
    def num_used(self) -> int:
        return self.size - self.num_free - self._num_lost

    def take(self, count: int) -> tuple[int, ...] | None:
        """So many, or None where there are not as many."""
        if count > self.num_free:
            return None
        found = []
        for _ in range(count):
            if self._free:
                found.append(heappop(self._free))
            else:
                found.append(self._fresh)
                self._fresh += 1
        return tuple(found)

    def give_back(self, slots: Iterable[int]) -> None:
        for slot in slots:
            heappush(self._free, slot)

    def lose(self, slots: Iterable[int]) -> None:
        """They cannot be written to, and are not handed out any more."""
        self._num_lost += sum(1 for _ in slots)

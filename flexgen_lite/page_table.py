"""The KV pages of each attention worker and who owns them: pure logic."""

from __future__ import annotations

from collections.abc import Sequence


class PageTable:
    """Pages 0 .. num_pages - 1, divided evenly among the workers; a sequence's pages all belong to one worker.

    Pages are handed out lowest first, so memory that was touched before is touched again.
    """

    def __init__(self, num_pages: int, page_tokens: int, num_workers: int) -> None:
        if num_pages < num_workers:
            raise ValueError(f"{num_pages} KV pages for {num_workers} attention workers: at least one page each")
        self.page_tokens = page_tokens
        self.num_workers = num_workers
        bounds = [num_pages * w // num_workers for w in range(num_workers + 1)]
        self._free = [list(range(bounds[w + 1] - 1, bounds[w] - 1, -1)) for w in range(num_workers)]
        self._sizes = [len(free) for free in self._free]
        self._owned: dict[int, tuple[int, tuple[int, ...]]] = {}

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence that could ever be held."""
        return min(self._sizes) * self.page_tokens

    @property
    def used_pages(self) -> int:
        return sum(self._sizes) - sum(len(free) for free in self._free)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)

    def allocate(self, sequence: int, num_tokens: int) -> tuple[int, tuple[int, ...]] | None:
        """Pages for `num_tokens` on the worker with the most free pages: (worker, pages), or None if none has room."""
        assert sequence not in self._owned, f"sequence {sequence} has its pages already"
        count = self.pages_for(num_tokens)
        worker = max(range(self.num_workers), key=lambda w: len(self._free[w]) / self._sizes[w])
        free = self._free[worker]
        if len(free) < count:
            return None
        pages = tuple(free[len(free) - count :][::-1])
        del free[len(free) - count :]
        self._owned[sequence] = (worker, pages)
        return worker, pages

    def release(self, sequence: int) -> None:
        worker, pages = self._owned.pop(sequence)
        free = self._free[worker]
        free.extend(reversed(pages))
        free.sort(reverse=True)

    def owned(self) -> Sequence[int]:
        return tuple(self._owned)

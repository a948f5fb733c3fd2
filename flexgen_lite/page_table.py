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

    def size(self, worker: int) -> int:
        """Pages of a worker."""
        return self._sizes[worker]

    def num_free(self, worker: int) -> int:
        return len(self._free[worker])

    def allocate(self, sequence: int, num_tokens: int, worker: int) -> tuple[int, ...] | None:
        """Pages of `worker` for `num_tokens`, or None if it has not as many left."""
        assert sequence not in self._owned, f"sequence {sequence} has its pages already"
        pages = self._take(worker, self.pages_for(num_tokens))
        if pages is not None:
            self._owned[sequence] = (worker, pages)
        return pages

    def grow(self, sequence: int, num_tokens: int) -> tuple[int, ...] | None:
        """All pages of a sequence, now at least enough for `num_tokens`, or None if its worker has not as many left."""
        worker, pages = self._owned[sequence]
        more = self._take(worker, self.pages_for(num_tokens) - len(pages))
        if more is None:
            return None
        self._owned[sequence] = (worker, pages + more)
        return pages + more

    def _take(self, worker: int, count: int) -> tuple[int, ...] | None:
        free = self._free[worker]
        if count <= 0:
            return ()
        if len(free) < count:
            return None
        pages = tuple(free[len(free) - count :][::-1])
        del free[len(free) - count :]
        return pages

    def release(self, sequence: int) -> None:
        worker, pages = self._owned.pop(sequence)
        free = self._free[worker]
        free.extend(reversed(pages))
        free.sort(reverse=True)

    def owned(self) -> Sequence[int]:
        return tuple(self._owned)

"""The KV pages of each attention worker, who has them, and which hold the beginning of a prompt: pure logic."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from hashlib import blake2b


class PageTable:
    """Pages 0 .. num_pages - 1, divided evenly among the workers; a sequence's pages all belong to one worker.

    A full page of a prompt is published under its key (`page_keys`) once it is stored: prompts that begin alike then
    share it. It is written no more, and stays when no sequence has it, until there is no other page left; then those
    go first that have not been used for the longest time.

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
        self._users: Counter[int] = Counter()  # by page
        self._found: list[dict[bytes, int]] = [{} for _ in range(num_workers)]  # published pages
        self._keys: dict[int, bytes] = {}  # of published pages
        self._idle: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_workers)]  # published, no user

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence that could ever be held."""
        return min(self._sizes) * self.page_tokens

    @property
    def used_pages(self) -> int:
        return sum(map(self.num_used, range(self.num_workers)))

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_tokens)

    def size(self, worker: int) -> int:
        """Pages of a worker."""
        return self._sizes[worker]

    def num_free(self, worker: int) -> int:
        """Pages that can be had."""
        return len(self._free[worker]) + len(self._idle[worker])

    def num_used(self, worker: int) -> int:
        """Pages that sequences have, shared ones counted once."""
        return self._sizes[worker] - self.num_free(worker)

    def find(self, worker: int, keys: Sequence[bytes]) -> tuple[int, ...]:
        """The published pages of the first keys, up to one that is not there."""
        found = map(self._found[worker].get, keys)
        return tuple(itertools.takewhile(lambda page: page is not None, found))  # type: ignore[arg-type]

    def num_idle(self, pages: Sequence[int]) -> int:
        """How many of these published pages no sequence has."""
        return sum(not self._users[page] for page in pages)

    def allocate(
        self, sequence: int, num_tokens: int, worker: int, shared: tuple[int, ...] = ()
    ) -> tuple[int, ...] | None:
        """Pages of `worker` for `num_tokens`, the first of them `shared`, or None if it has not as many left."""
        assert sequence not in self._owned, f"sequence {sequence} has its pages already"
        count = self.pages_for(num_tokens) - len(shared)
        if count > self.num_free(worker) - self.num_idle(shared):
            return None
        for page in shared:
            self._idle[worker].pop(page, None)
            self._users[page] += 1
        pages = shared + self._take(worker, count)
        self._owned[sequence] = worker, pages
        return pages

    def grow(self, sequence: int, num_tokens: int) -> tuple[int, ...] | None:
        """All pages of a sequence, now at least enough for `num_tokens`, or None if its worker has not as many left."""
        worker, pages = self._owned[sequence]
        count = self.pages_for(num_tokens) - len(pages)
        if count > self.num_free(worker):
            return None
        pages += self._take(worker, count)
        self._owned[sequence] = worker, pages
        return pages

    def publish(self, sequence: int, keys: Sequence[bytes]) -> None:
        """The sequence's first pages hold what these keys stand for, and will to the end."""
        worker, pages = self._owned[sequence]
        found = self._found[worker]
        for page, key in zip(pages, keys, strict=False):
            if key not in found:
                found[key] = page
                self._keys[page] = key

    def _take(self, worker: int, count: int) -> tuple[int, ...]:
        free, idle = self._free[worker], self._idle[worker]
        while len(free) < count:
            page, _ = idle.popitem(last=False)
            del self._found[worker][self._keys.pop(page)]
            free.append(page)
        first = len(free) - max(0, count)
        pages = tuple(free[first:][::-1])
        del free[first:]
        self._users.update(pages)
        return pages

    def release(self, sequence: int) -> None:
        worker, pages = self._owned.pop(sequence)
        free = self._free[worker]
        for page in reversed(pages):  # of a beginning that is shared, the end goes first
            self._users[page] -= 1
            if self._users[page]:
                continue
            del self._users[page]
            if page in self._keys:
                self._idle[worker][page] = None
            else:
                free.append(page)
        free.sort(reverse=True)


def page_keys(tokens: Sequence[int], page_tokens: int, num_pages: int) -> tuple[bytes, ...]:
    """Keys of a prompt's first pages: K and V of a page depend on all tokens up to its end, and on nothing else."""
    keys, key = [], b""
    for first in range(0, num_pages * page_tokens, page_tokens):
        page = array("i", tokens[first : first + page_tokens])
        key = blake2b(key + page.tobytes(), digest_size=16).digest()
        keys.append(key)
    return tuple(keys)

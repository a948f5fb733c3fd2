"""The KV pages of each attention worker, who has them, and which hold the beginning of a prompt: pure logic."""

from __future__ import annotations

import itertools
from array import array
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from heapq import heappop, heappush

from flexgen_lite.memory.kv_groups import block_tokens, pages_for
from flexgen_lite.wire.arena_specs import KvGroup, PageRun

Block = tuple[int, ...]  # pages of one group that hold `block_tokens` tokens of a sequence; known by the first
Pages = tuple[PageRun, ...]  # of a sequence, by group
_LONGEST = 1 << 40  # tokens


@dataclass(slots=True)
class _Held:
    """What a sequence has.

    Attributes:
        firsts: by group, the number of its first block: those before it are behind the window.
        blocks: by group, from that one on.
        num_shared: blocks at its beginning that others had stored.
        anchors: shared blocks behind the windows, by group.
        runs: all of it but the anchors, as workers are told.
    """

    worker: int
    firsts: list[int]
    blocks: list[list[Block]]
    num_shared: int
    anchors: list[Block] = field(default_factory=list)
    runs: Pages = ()


class PageTable:
    """Pages 0 .. num_pages - 1, divided evenly among the workers; a sequence's pages all belong to one worker.

    A sequence has pages of its own in each group of columns (`KvGroup`). They come in *blocks* of `block_tokens`
    tokens. In groups with a window it has those alone that its next tokens can see.

    A full block of a prompt is published under its key (`block_keys`) once it is stored: prompts that begin alike then
    share it. It is written no more, and stays when no sequence has it, until there is no other page left; then those
    go first that have not been used for the longest time. What a sequence shares it keeps for others when its own
    window has passed, as long as there are other pages.

    Pages are handed out lowest first, so memory that was touched before is touched again.
    """

    def __init__(self, num_pages: int, groups: Sequence[KvGroup], num_workers: int) -> None:
        if num_pages < num_workers:
            raise ValueError(f"{num_pages} KV pages for {num_workers} attention workers: at least one page each")
        self.block_tokens = block_tokens(groups)
        self.num_workers = num_workers
        self._groups = tuple(groups)
        self._sizes_of_blocks = [self.block_tokens // group.page_tokens for group in groups]
        self._windowed = [bool(group.window or group.attention_chunk) for group in groups]
        bounds = [first_page(num_pages, num_workers, w) for w in range(num_workers + 1)]
        self._free = [list(range(bounds[w], bounds[w + 1])) for w in range(num_workers)]  # heaps
        self._sizes = [len(free) for free in self._free]
        self._held: dict[int, _Held] = {}
        self._users: Counter[int] = Counter()  # by block
        self._found: list[list[dict[bytes, Block]]] = [[{} for _ in groups] for _ in range(num_workers)]  # published
        self._keys: dict[int, tuple[int, bytes]] = {}  # of published blocks: group and key
        self._idle: list[OrderedDict[int, Block]] = [OrderedDict() for _ in range(num_workers)]  # published, no user
        self._num_idle = [0] * num_workers  # pages

    def max_tokens(self, rows: int) -> int:
        """Tokens of the longest sequence that could ever be held, if at most `rows` of it are computed in a pass."""
        size = min(self._sizes)
        return bisect_right(range(_LONGEST), size, key=lambda tokens: self.pages_for(tokens, rows)) - 1

    @property
    def num_pages(self) -> int:
        return sum(self._sizes)

    @property
    def used_pages(self) -> int:
        return sum(map(self.num_used, range(self.num_workers)))

    def pages_for(self, num_tokens: int, rows: int = 1) -> int:
        """Most pages that a sequence of `num_tokens` has, of which `rows` at most are computed in one pass."""
        return pages_for(self._groups, num_tokens, rows)

    def size(self, worker: int) -> int:
        """Pages of a worker."""
        return self._sizes[worker]

    def num_free(self, worker: int) -> int:
        """Pages that can be had."""
        return len(self._free[worker]) + self._num_idle[worker]

    def num_used(self, worker: int) -> int:
        """Pages that sequences have, shared ones counted once."""
        return self._sizes[worker] - self.num_free(worker)

    def find(self, worker: int, keys: Sequence[bytes]) -> int:
        """How many blocks at the beginning of a prompt with these keys are there, for a sequence to go on from."""
        most, found = len(keys), self._found[worker]
        for of_group, windowed in zip(found, self._windowed, strict=True):
            if not windowed:
                most = next((i for i, key in enumerate(keys[:most]) if key not in of_group), most)
        windows = [index for index, windowed in enumerate(self._windowed) if windowed]
        if not windows:
            return most
        lengths = [0] * len(self._groups)  # of the run of published blocks that ends here
        best = 0
        for count, key in enumerate(keys[:most], start=1):
            for index in windows:
                lengths[index] = lengths[index] + 1 if key in found[index] else 0
            if all(lengths[index] >= count - self._first_block(index, count * self.block_tokens) for index in windows):
                best = count
        return best

    def num_shared(self, worker: int, keys: Sequence[bytes]) -> int:
        """How many pages sequences have of those that another one would share: of blocks that `find` has counted."""
        blocks = itertools.chain.from_iterable(self._shared(worker, keys))
        return sum(len(block) for block in blocks if self._users[block[0]])

    def allocate(
        self,
        sequence: int,
        worker: int,
        num_tokens: int,
        rows: int,
        keys: Sequence[bytes] = (),
        stored: int | None = None,
    ) -> Pages | None:
        """Pages of `worker`, or None if it has not as many left.

        Args:
            num_tokens: that are known of the sequence; where all are kept it has pages for all of them.
            rows: so many follow the stored ones in the next pass.
            keys: of the blocks that it shares, which `find` has counted.
            stored: tokens whose K and V are there, or will be before that pass; None: those of the shared blocks.
        """
        assert sequence not in self._held, f"sequence {sequence} has its pages already"
        stored = len(keys) * self.block_tokens if stored is None else stored
        shared = self._shared(worker, keys, stored)
        firsts = [self._first_block(index, stored) for index in range(len(self._groups))]
        held = _Held(worker, firsts, shared, len(keys))
        missing = [
            self._missing(held, index, stored + rows if windowed else num_tokens)
            for index, windowed in enumerate(self._windowed)
        ]
        idle = sum(len(block) for blocks in shared for block in blocks if not self._users[block[0]])
        if self._pages_of(missing) > self.num_free(worker) - idle:
            return None
        for block in itertools.chain.from_iterable(shared):
            self._use(worker, block)
        self._held[sequence] = held
        return self._extend(held, missing)

    def grow(self, sequence: int, begin: int, end: int) -> Pages | None:
        """All pages of a sequence whose tokens `begin` .. `end` are next, enough for them, or None if its worker has
        not as many left. What no later token sees is free from here on."""
        held = self._held[sequence]
        slid = self._slide(held, begin)
        missing = [self._missing(held, index, end) for index in range(len(self._groups))]
        needed = self._pages_of(missing)
        if needed > self.num_free(held.worker):
            self._give_back(held.worker, held.anchors)
            held.anchors = []
            if needed > self.num_free(held.worker):
                self._note_runs(held)
                return None
        return self._extend(held, missing) if needed or slid else held.runs

    def needed(self, sequence: int, begin: int, end: int) -> int:
        """Pages that `grow` would take, less those that it would give back."""
        held, total = self._held[sequence], 0
        for index, size in enumerate(self._sizes_of_blocks):
            first = held.firsts[index]
            gone = max(0, self._first_block(index, begin) - first) if self._windowed[index] else 0
            passed = held.blocks[index][max(0, held.num_shared - first) : gone]
            freed = sum(self._users[block[0]] == 1 for block in passed)
            total += (self._missing(held, index, end) - freed) * size
        return max(0, total)

    def num_own(self, sequence: int) -> int:
        """Pages that could be had if the sequence had none."""
        held = self._held[sequence]
        blocks = itertools.chain(held.anchors, *held.blocks)
        return sum(len(block) for block in blocks if self._users[block[0]] == 1)

    def pages_of(self, sequence: int) -> Pages:
        """What a sequence has."""
        return self._held[sequence].runs

    def publish(self, sequence: int, keys: Sequence[bytes]) -> None:
        """The sequence's first blocks hold what these keys stand for, and will to the end."""
        held = self._held[sequence]
        for index, of_group in enumerate(self._found[held.worker]):
            first = held.firsts[index]
            for block, key in zip(held.blocks[index], keys[first:], strict=False):
                if key not in of_group:
                    of_group[key] = block
                    self._keys[block[0]] = index, key

    def hold(self, worker: int, key: bytes) -> list[Block] | None:
        """The pages of a published block, by group, which stay as they are until `let_go`; None where one is gone."""
        blocks = [of_group.get(key) for of_group in self._found[worker]]
        found = [block for block in blocks if block is not None]
        if len(found) < len(blocks):
            return None
        for block in found:
            self._use(worker, block)
        return found

    def let_go(self, worker: int, blocks: Iterable[Block]) -> None:
        self._give_back(worker, blocks)

    def num_held(self, blocks: Iterable[Block]) -> int:
        """Pages of blocks that were held which no sequence has."""
        return sum(len(block) for block in blocks if self._users[block[0]] == 1)

    def release(self, sequence: int) -> None:
        held = self._held.pop(sequence)
        for blocks in held.blocks:
            self._give_back(held.worker, reversed(blocks))  # of a beginning that is shared, the end goes first
        self._give_back(held.worker, reversed(held.anchors))

    def _shared(self, worker: int, keys: Sequence[bytes], stored: int | None = None) -> list[list[Block]]:
        """By group, those of the first blocks with these keys that the token at `stored` can see, or the one behind
        them."""
        stored = len(keys) * self.block_tokens if stored is None else stored
        return [
            [of_group[key] for key in keys[self._first_block(index, stored) :]]
            for index, of_group in enumerate(self._found[worker])
        ]

    def _first_block(self, index: int, position: int) -> int:
        """That the token at `position` sees."""
        return self._groups[index].first_seen(position) // self.block_tokens

    def _missing(self, held: _Held, index: int, end: int) -> int:
        """Blocks up to token `end` that the sequence has not."""
        blocks = held.blocks[index]
        return max(0, -(-end // self.block_tokens) - held.firsts[index] - len(blocks))

    def _pages_of(self, counts: Sequence[int]) -> int:
        return sum(count * size for count, size in zip(counts, self._sizes_of_blocks, strict=True))

    def _slide(self, held: _Held, position: int) -> bool:
        """Gives back what neither the token at `position` nor a later one sees; whether there was any."""
        slid = False
        for index, windowed in enumerate(self._windowed):
            count = self._first_block(index, position) - held.firsts[index] if windowed else 0
            if count > 0:
                gone, held.blocks[index] = held.blocks[index][:count], held.blocks[index][count:]
                shared = max(0, held.num_shared - held.firsts[index])
                held.firsts[index] += count
                held.anchors += gone[:shared]
                self._give_back(held.worker, gone[shared:])
                slid = True
        return slid

    def _extend(self, held: _Held, missing: Sequence[int]) -> Pages:
        for blocks, size, count in zip(held.blocks, self._sizes_of_blocks, missing, strict=True):
            blocks += self._take(held.worker, size, count)
        self._note_runs(held)
        return held.runs

    def _note_runs(self, held: _Held) -> None:
        held.runs = tuple(
            PageRun(first * size, tuple(itertools.chain.from_iterable(blocks)))
            for first, size, blocks in zip(held.firsts, self._sizes_of_blocks, held.blocks, strict=True)
        )

    def _take(self, worker: int, size: int, count: int) -> list[Block]:
        free, needed = self._free[worker], size * count
        if needed == 0:
            return []
        while len(free) < needed:
            self._forget_oldest(worker)
        pages = [heappop(free) for _ in range(needed)]
        blocks = [tuple(pages[i : i + size]) for i in range(0, needed, size)]
        self._users.update(block[0] for block in blocks)
        return blocks

    def _forget_oldest(self, worker: int) -> None:
        """The published block that nobody has had for the longest time is free."""
        first, block = self._idle[worker].popitem(last=False)
        self._num_idle[worker] -= len(block)
        index, key = self._keys.pop(first)
        del self._found[worker][index][key]
        self._free_again(worker, block)

    def _use(self, worker: int, block: Block) -> None:
        if self._idle[worker].pop(block[0], None) is not None:
            self._num_idle[worker] -= len(block)
        self._users[block[0]] += 1

    def _give_back(self, worker: int, blocks: Iterable[Block]) -> None:
        for block in blocks:
            first = block[0]
            self._users[first] -= 1
            if self._users[first]:
                continue
            del self._users[first]
            if first in self._keys:
                self._idle[worker][first] = block
                self._num_idle[worker] += len(block)
            else:
                self._free_again(worker, block)

    def _free_again(self, worker: int, block: Block) -> None:
        for page in block:
            heappush(self._free[worker], page)


def first_page(num_pages: int, num_workers: int, worker: int) -> int:
    """The first of a worker's pages; those up to the first of the next are its own."""
    return num_pages * worker // num_workers


def num_pages(runs: Pages) -> int:
    return sum(len(run.pages) for run in runs)


def block_keys(tokens: Sequence[int], num_tokens: int, num_blocks: int) -> tuple[bytes, ...]:
    """Keys of a prompt's first blocks of `num_tokens`: K and V of a block depend on all tokens up to its end, and on
    nothing else."""
    keys, key = [], b""
    for first in range(0, num_blocks * num_tokens, num_tokens):
        block = array("i", tokens[first : first + num_tokens])
        key = blake2b(key + block.tobytes(), digest_size=16).digest()
        keys.append(key)
    return tuple(keys)

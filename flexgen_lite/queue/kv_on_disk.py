"""Sequences that are parked on disk and brought back, and beginnings of prompts that are stored there: pure logic.

Orders go to the disk loader, one after the other; what they read from or write to belongs to them until they are
answered.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from flexgen_lite.queue.disk_slots import DiskSlots
from flexgen_lite.queue.page_table import Block, Pages, PageTable
from flexgen_lite.queue.parked import Parked
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.queue.stored_prefixes import StoredPrefixes
from flexgen_lite.wire.arena_specs import KvGroup
from flexgen_lite.wire.kv_on_disk import BlockOnDisk, FetchBlocks, FetchKv, KvMoved, MoveKv, ParkKv, StoreBlocks

LEAST_BLOCKS = 2  # of a sequence that is parked, or of a beginning that is read: fewer are computed as fast
STORING_SHARE = 16  # one page in so many may be on its way into the file of prefixes
BLOCKS_OF_AN_ORDER = 16
MOST_CANDIDATES = 1 << 14  # blocks that are to be stored


@dataclass(slots=True)
class _Move:
    """What an order, which has not been answered, has to do with.

    Attributes:
        request: None where it stores prefixes.
        worker: whose pages they are.
        state: that the sequence has, -1: none.
        leaves: its pages are free when the order is answered, whatever came of it.
        is_gone: nobody waits for the sequence any more.
        keys: of the blocks that are read; `all_keys`: with those before them, also of those that are written.
        held: pages of blocks that are written.
    """

    order: MoveKv
    request: RunningRequest | None
    worker: int
    state: int = -1
    leaves: bool = False
    is_gone: bool = False
    keys: tuple[bytes, ...] = ()
    all_keys: tuple[bytes, ...] = ()
    held: list[Block] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A block that a worker has, the `number`-th of those with these keys."""

    worker: int
    keys: tuple[bytes, ...]
    number: int


@dataclass(frozen=True, slots=True)
class Landed:
    """An order about a sequence was answered. `has_pages`: it may run. `state`: that it had and has no more."""

    request: RunningRequest
    has_pages: bool
    state: int = -1


class KvOnDisk:
    """Args:
    table: the pages; those of a sequence stay its own until the order about them is answered.
    groups: the table's.
    num_slots: of the file of parked sequences; a slot has room for a page.
    state_slots: that a sequence's state takes.
    prefix_slots: of the file of stored prefixes; 0: there is none.
    """

    def __init__(
        self,
        table: PageTable,
        groups: Sequence[KvGroup],
        num_slots: int,
        state_slots: int = 0,
        prefix_slots: int = 0,
    ) -> None:
        self._table = table
        self._groups = tuple(groups)
        self._slots = DiskSlots(num_slots)
        self._num_state_slots = state_slots
        self._prefixes = StoredPrefixes(prefix_slots)
        self._prefixes_usable = False
        self._candidates: OrderedDict[bytes, _Candidate] = OrderedDict()  # blocks that are to be stored
        self._being_stored: set[bytes] = set()
        self._moves: dict[int, _Move] = {}
        self._orders: list[MoveKv] = []  # not sent yet
        self._next_ticket = 0
        self._num_storing = 0  # pages
        self.num_parked = 0  # sequences that are on disk
        self.totals: Counter[str] = Counter()  # by the names in the status

    @property
    def is_moving(self) -> bool:
        """An order has not been answered."""
        return bool(self._moves)

    @property
    def num_slots_used(self) -> int:
        return self._slots.num_used

    def take_orders(self) -> list[MoveKv]:
        """Those that are to be sent."""
        orders, self._orders = self._orders, []
        return orders

    def coming(self, worker: int) -> int:
        """Pages that will be free when what is on its way is done."""
        total = 0
        for move in self._moves.values():
            if move.worker == worker and move.request is not None and move.leaves:
                total += self._table.num_own(move.request.id)
            elif move.worker == worker and move.request is None:
                total += self._table.num_held(move.held)
        return total

    # ------------------------------------------------------------------------------------------------ sequences

    def holds(self, num_sequences: int) -> bool:
        """Whether there would be room for all pages, and the states of so many sequences, at once."""
        return self._slots.num_usable >= self._table.num_pages + num_sequences * self._num_state_slots

    def can_park(self, request: RunningRequest) -> bool:
        """Whether a running sequence has more than is computed as fast as written and read, and there is room."""
        if request.stored < LEAST_BLOCKS * self._table.block_tokens:
            return False
        _, wanted = self._to_park(request)
        num_state = self._num_state_slots if request.state >= 0 else 0
        return sum(map(len, wanted)) + num_state <= self._slots.num_free

    def park(self, request: RunningRequest) -> bool:
        """Has a running sequence written; False if it cannot be parked."""
        if not self.can_park(request):
            return False
        firsts, wanted = self._to_park(request)
        pages = [page for of_group in wanted for page in of_group]
        num_state = self._num_state_slots if request.state >= 0 else 0
        taken = self._slots.take(len(pages) + num_state)
        assert taken is not None
        slots, begin = [], 0
        for of_group in wanted:
            slots.append(taken[begin : begin + len(of_group)])
            begin += len(of_group)
        request.parked = Parked(request.stored, tuple(firsts), tuple(slots), taken[begin:])
        place = request.state_places[0] if request.state >= 0 else -1
        order = ParkKv(self._ticket(), tuple(pages), place, taken)
        self._move(_Move(order, request, request.worker, request.state, leaves=True))
        self.num_parked += 1
        return True

    def fetch(self, request: RunningRequest, worker: int, pages: Pages, num_shared: int) -> None:
        """Has a parked sequence read back, to the pages and the state that it was given; its first `num_shared` tokens
        are there."""
        parked = request.parked
        assert parked is not None and parked.checksums, "a sequence is read before it is written"
        targets: list[int] = []
        slots: list[int] = []
        checksums: list[int] = []
        begin = 0
        for group, run, first, of_group in zip(self._groups, pages, parked.firsts, parked.slots, strict=True):
            wanted = max(first, num_shared // group.page_tokens)
            skipped = min(wanted - first, len(of_group))
            slots += of_group[skipped:]
            checksums += parked.checksums[begin + skipped : begin + len(of_group)]
            targets += run.pages[first + skipped - run.first : first + len(of_group) - run.first]
            begin += len(of_group)
        slots += parked.state_slots
        checksums += parked.checksums[begin:]
        place = 2 * request.state if request.state >= 0 else -1
        order = FetchKv(self._ticket(), tuple(targets), place, tuple(slots), tuple(checksums))
        self._move(_Move(order, request, worker, request.state))

    def leave(self, request: RunningRequest, is_gone: bool) -> None:
        """A sequence that is being read has to make room, or is over: its pages are free once it is read."""
        move = next(move for move in self._moves.values() if move.request is request)
        move.leaves, move.is_gone = True, is_gone

    def forget(self, request: RunningRequest) -> None:
        """A waiting sequence is over."""
        if request.moving:
            self.leave(request, is_gone=True)
        elif request.parked is not None:
            self._forget_parked(request)

    def moved(self, message: KvMoved) -> Landed | None:
        """An order was answered; None where it was about no sequence."""
        move = self._moves.pop(message.ticket)
        self.totals["kv_disk_failures"] += bool(message.error)
        match move.order:
            case StoreBlocks():
                self._blocks_stored(move, move.order, not message.error)
                landed = None
            case FetchBlocks():
                landed = self._prefix_read(move, not message.error)
            case ParkKv():
                landed = self._parked(move, move.order, message)
            case FetchKv():
                landed = self._fetched(move, not message.error)
        self._store_more()
        return landed

    def _parked(self, move: _Move, order: ParkKv, message: KvMoved) -> Landed:
        request = self._landed(move)
        self._table.release(request.id)
        assert request.parked is not None, "a sequence was written that is not parked"
        if message.error:
            self._slots.lose(order.slots)  # where a disk is full, it is so for the next one, too
            request.parked = None
            self.num_parked -= 1
        else:
            self.totals["parked_sequences"] += 1
            request.parked = replace(request.parked, checksums=message.checksums)
            if move.is_gone:
                self._forget_parked(request)
        return Landed(request, False, move.state)

    def _fetched(self, move: _Move, is_good: bool) -> Landed:
        request = self._landed(move)
        parked = request.parked
        assert parked is not None, "a sequence was read that is not parked"
        if not is_good or move.is_gone or not move.leaves:
            self._forget_parked(request)
        if is_good and not move.leaves:
            request.stored = parked.stored
            num_blocks = min(parked.stored, request.num_prompt_tokens) // self._table.block_tokens
            self._table.publish(request.id, (request.block_keys or ())[:num_blocks])
            self.totals["fetched_sequences"] += 1
            return Landed(request, True)
        self._table.release(request.id)
        return Landed(request, False, move.state)

    def _landed(self, move: _Move) -> RunningRequest:
        assert move.request is not None
        move.request.moving = False
        return move.request

    def _forget_parked(self, request: RunningRequest) -> None:
        assert request.parked is not None
        self._slots.give_back(request.parked.all_slots)
        request.parked = None
        self.num_parked -= 1

    def _to_park(self, request: RunningRequest) -> tuple[list[int], list[tuple[int, ...]]]:
        """By group, the number of the first page that is written, and the pages from there on that have anything: whole
        blocks from the first that its next token sees, for they will be others' to share."""
        firsts, wanted = [], []
        size = self._table.block_tokens
        for group, run in zip(self._groups, self._table.pages_of(request.id), strict=True):
            first = max(run.first, group.first_seen(request.stored) // size * (size // group.page_tokens))
            firsts.append(first)
            wanted.append(run.pages[first - run.first : -(-request.stored // group.page_tokens) - run.first])
        return firsts, wanted

    # ------------------------------------------------------------------------------------------------ prefixes

    def open_prefixes(self, blocks: Sequence[tuple[bytes, int]], usable: bool) -> None:
        """What there is in the file, now that a loader has it."""
        self._prefixes_usable = usable
        self._prefixes.open(blocks)
        self._store_more()

    def close_prefixes(self) -> None:
        """Nobody has the file, for a time."""
        self._prefixes_usable = False

    def find_prefix(self, keys: Sequence[bytes], num_shared: int) -> int:
        """The end of what can be read of blocks behind the first `num_shared`; these, where it is not worth it."""
        end = self._prefixes.find(keys, num_shared) if self._prefixes_usable else num_shared
        return end if end - num_shared >= LEAST_BLOCKS else num_shared

    def fetch_prefix(
        self, request: RunningRequest, worker: int, pages: Pages, keys: Sequence[bytes], num_shared: int
    ) -> None:
        """Has the blocks with these keys, but for the first `num_shared`, read to the sequence's pages."""
        wanted = tuple(keys[num_shared:])
        slots = self._prefixes.begin_to_read(wanted)
        self._prefixes.touch(keys)
        blocks = tuple(
            BlockOnDisk(key, slot, self._pages_of_block(pages, number))
            for number, (key, slot) in enumerate(zip(wanted, slots, strict=True), start=num_shared)
        )
        order = FetchBlocks(self._ticket(), blocks)
        self._move(_Move(order, request, worker, request.state, keys=wanted, all_keys=tuple(keys)))

    def offer(self, worker: int, keys: tuple[bytes, ...]) -> None:
        """The worker has these blocks of a prompt: they may be stored."""
        if not self._prefixes_usable:
            return
        self._prefixes.touch(keys)
        for number, key in enumerate(keys):
            if key not in self._prefixes and key not in self._being_stored and len(self._candidates) < MOST_CANDIDATES:
                self._candidates.setdefault(key, _Candidate(worker, keys, number))
        self._store_more()

    def _pages_of_block(self, pages: Pages, number: int) -> tuple[int, ...]:
        """Of all groups, -1 for those that are behind a window."""
        found = []
        for group, run in zip(self._groups, pages, strict=True):
            count = self._table.block_tokens // group.page_tokens
            for page in range(number * count, (number + 1) * count):
                found.append(run.pages[page - run.first] if page >= run.first else -1)
        return tuple(found)

    def _prefix_read(self, move: _Move, is_good: bool) -> Landed:
        request = self._landed(move)
        self._prefixes.end_reading(move.keys, is_good)
        if is_good and not move.leaves:
            request.stored = len(move.all_keys) * self._table.block_tokens
            self._table.publish(request.id, move.all_keys)
            self.totals["disk_prefix_tokens"] += len(move.keys) * self._table.block_tokens
            return Landed(request, True)
        self._table.release(request.id)
        return Landed(request, False, move.state)

    def _store_more(self) -> None:
        """Orders to store what was offered, some at a time: pages that are being written are nobody's to use."""
        limit = max(1, self._table.num_pages // STORING_SHARE)
        while self._prefixes_usable and self._candidates and self._num_storing < limit:
            blocks: list[BlockOnDisk] = []
            held: list[Block] = []
            last = next(iter(self._candidates.values()))
            worker = last.worker
            while self._candidates and len(blocks) < BLOCKS_OF_AN_ORDER and self._num_storing < limit:
                key = next(iter(self._candidates))
                if self._candidates[key].worker != worker:
                    break
                last = self._candidates.pop(key)
                found = self._table.hold(worker, key)
                if found is None:
                    continue
                slot = self._prefixes.begin_to_write()
                if slot is None:
                    self._table.let_go(worker, found)
                    continue
                pages = tuple(page for block in found for page in block)
                blocks.append(BlockOnDisk(key, slot, pages))
                held += found
                self._being_stored.add(key)
                self._num_storing += len(pages)
            if blocks:
                order = StoreBlocks(self._ticket(), tuple(blocks))
                self._move(_Move(order, None, worker, all_keys=last.keys[: last.number + 1], held=held))

    def _blocks_stored(self, move: _Move, order: StoreBlocks, is_good: bool) -> None:
        self._table.let_go(move.worker, move.held)
        for block in reversed(order.blocks):
            self._num_storing -= len(block.pages)
            self._being_stored.discard(block.key)
            self._prefixes.end_writing(block.key, block.slot, is_good)
        self._prefixes.touch(move.all_keys)
        self.totals["disk_prefix_blocks_stored"] += len(order.blocks) if is_good else 0

    # ------------------------------------------------------------------------------------------------ orders

    def _ticket(self) -> int:
        self._next_ticket += 1
        return self._next_ticket

    def _move(self, move: _Move) -> None:
        self._moves[move.order.ticket] = move
        self._orders.append(move.order)
        if move.request is not None:
            move.request.moving = True

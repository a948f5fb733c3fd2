"""Beginnings of prompts whose K and V are in a file, from this run of the engine or from another: pure logic."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from flexgen_lite.queue.disk_slots import DiskSlots


class StoredPrefixes:
    """Full blocks of prompts by their keys (`page_table.block_keys`), each in a slot of the file. Where there is no
    slot left, the block goes that has not been used for the longest time; of a beginning, the end goes first.

    Args:
        num_slots: of the file.
    """

    def __init__(self, num_slots: int) -> None:
        self._slots = DiskSlots(num_slots)
        self._found: OrderedDict[bytes, int] = OrderedDict()
        self._busy: Counter[bytes] = Counter()  # being read
        self._num_slots = num_slots

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, key: bytes) -> bool:
        return key in self._found

    def open(self, blocks: Iterable[tuple[bytes, int]]) -> None:
        """What the file has is known, those first that were stored first. What was known before is forgotten."""
        self._slots = DiskSlots(self._num_slots)
        self._found.clear()
        used = {}
        for key, slot in blocks:
            used[slot] = key
        free = self._slots.take(max(used, default=-1) + 1) or ()
        self._slots.give_back(slot for slot in free if slot not in used)
        for slot, key in used.items():
            if key in self._found:
                self._slots.give_back([self._found.pop(key)])
            self._found[key] = slot

    def find(self, keys: Sequence[bytes], begin: int) -> int:
        """The end of the run of blocks from `begin` on that are there."""
        end = begin
        while end < len(keys) and keys[end] in self._found:
            end += 1
        return end

    def touch(self, keys: Sequence[bytes]) -> None:
        """They are of use."""
        for key in reversed(keys):
            if key in self._found:
                self._found.move_to_end(key)

    def begin_to_read(self, keys: Sequence[bytes]) -> list[int]:
        """Their slots, which stay as they are until `end_reading`."""
        self._busy.update(keys)
        return [self._found[key] for key in keys]

    def end_reading(self, keys: Sequence[bytes], is_good: bool) -> None:
        for key in keys:
            self._busy[key] -= 1
            if not self._busy[key]:
                del self._busy[key]
            if not is_good and not self._busy[key] and key in self._found:
                self._slots.give_back([self._found.pop(key)])

    def begin_to_write(self) -> int | None:
        """A slot, what was in it is forgotten; None where all are busy."""
        free = self._slots.take(1)
        if free is None:
            oldest = next((key for key in self._found if not self._busy[key]), None)
            return None if oldest is None else self._found.pop(oldest)
        return free[0]

    def end_writing(self, key: bytes, slot: int, is_good: bool) -> None:
        if not is_good:
            self._slots.lose([slot])
        elif key in self._found:
            self._slots.give_back([slot])
        else:
            self._found[key] = slot

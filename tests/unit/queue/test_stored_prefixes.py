"""Slots of files on disk, and what is stored in them of prompts' beginnings."""

from __future__ import annotations

import pytest

from flexgen_lite.queue.disk_slots import DiskSlots
from flexgen_lite.queue.stored_prefixes import StoredPrefixes

KEYS = [bytes([n]) for n in range(10)]


def store(prefixes: StoredPrefixes, *keys: bytes) -> None:
    for key in keys:
        slot = prefixes.begin_to_write()
        assert slot is not None
        prefixes.end_writing(key, slot, True)


def test_slots_that_were_used_are_used_again_first() -> None:
    slots = DiskSlots(5)
    first, second = slots.take(2), slots.take(2)
    assert (first, second, slots.take(2)) == ((0, 1), (2, 3), None)
    slots.give_back((1,))
    assert slots.num_free == 2 and slots.num_used == 3
    assert slots.take(2) == (1, 4) and slots.take(1) is None


def test_slots_that_cannot_be_written_to_are_not_tried_again() -> None:
    slots = DiskSlots(4)
    slots.take(2)
    slots.lose((0, 1))
    assert slots.take(3) is None and slots.take(2) == (2, 3)
    assert slots.num_used == 2


def test_what_was_not_used_for_the_longest_time_goes_first() -> None:
    prefixes = StoredPrefixes(3)
    store(prefixes, *KEYS[:3])
    prefixes.touch(KEYS[:1])
    store(prefixes, KEYS[3])
    assert [key in prefixes for key in KEYS[:4]] == [True, False, True, True]


def test_of_a_beginning_the_end_goes_first() -> None:
    prefixes = StoredPrefixes(4)
    store(prefixes, *KEYS[:4])
    prefixes.touch(KEYS[:4])
    store(prefixes, KEYS[4], KEYS[5])
    assert prefixes.find(KEYS, 0) == 2


def test_what_is_being_read_stays() -> None:
    prefixes = StoredPrefixes(2)
    store(prefixes, *KEYS[:2])
    assert prefixes.begin_to_read(KEYS[:2]) == [0, 1]
    assert prefixes.begin_to_write() is None
    prefixes.end_reading(KEYS[:2], True)
    assert prefixes.begin_to_write() == 0 and KEYS[0] not in prefixes


def test_what_cannot_be_read_is_forgotten_and_its_slot_is_free() -> None:
    prefixes = StoredPrefixes(2)
    store(prefixes, *KEYS[:2])
    prefixes.begin_to_read(KEYS[:1])
    prefixes.end_reading(KEYS[:1], False)
    assert prefixes.find(KEYS, 0) == 0 and prefixes.find(KEYS, 1) == 2
    assert prefixes.begin_to_write() == 0


@pytest.mark.parametrize("gap", [0, 1, 2])
def test_only_a_run_without_a_gap_is_found(gap: int) -> None:
    prefixes = StoredPrefixes(8)
    store(prefixes, *(key for number, key in enumerate(KEYS[:5]) if number != gap))
    assert prefixes.find(KEYS, 0) == gap and prefixes.find(KEYS, gap + 1) == 5


def test_what_a_file_has() -> None:
    """Slots that it does not use are free; a key that it has twice is where it was written last."""
    prefixes = StoredPrefixes(5)
    store(prefixes, KEYS[9])
    prefixes.open([(KEYS[0], 3), (KEYS[1], 1), (KEYS[0], 4)])
    assert KEYS[9] not in prefixes and len(prefixes) == 2
    assert prefixes.begin_to_read(KEYS[:2]) == [4, 1]
    free = {prefixes.begin_to_write() for _ in range(3)}
    assert free == {0, 2, 3} and prefixes.begin_to_write() is None


def test_a_slot_that_could_not_be_written_is_lost() -> None:
    prefixes = StoredPrefixes(1)
    slot = prefixes.begin_to_write()
    assert slot == 0
    prefixes.end_writing(KEYS[0], slot, False)
    assert KEYS[0] not in prefixes and prefixes.begin_to_write() is None

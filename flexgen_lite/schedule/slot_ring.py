"""Which layer's weights lie in which slot, and which to fetch next: pure logic.

    FREE --next_fill--> FILLING --filled--> READY --release--> FREE        (slots of the ring)
                                            READY                          (pinned units stay)

Units come in a cyclic order, 0 .. n-1, 0 .. n-1, ...: the ring runs ahead of its readers as far as it has slots, across
the end of a pass into the next. Units that are passed on for good, to another ring where they are pinned, come once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence


class SlotRing:
    """Slots for `pinned` units (each its own, filled once) and a ring for the `streamed` ones.

    Args:
        pinned: unit -> slot, in the order in which they are first needed.
        streamed: the other units, in the order of a pass.
        slots: the ring's slots.
        once: streamed units that are not fetched again when they have been released, until a rewind.
    """

    def __init__(
        self,
        pinned: Mapping[int, int],
        streamed: Sequence[int],
        slots: Sequence[int],
        once: Collection[int] = (),
    ) -> None:
        if streamed and len(slots) < min(2, len(streamed)):
            raise ValueError(f"{len(streamed)} streamed layers need at least 2 slots, got {len(slots)}")
        self._pinned = dict(pinned)
        self._unfilled = deque(pinned)
        self._streamed = tuple(streamed)
        self._once = frozenset(once)
        self._passed_on: set[int] = set()
        self._free = deque(slots)
        self._cursor = 0  # position in `streamed` of the next unit to fetch
        self._held: dict[int, int] = {}  # streamed unit -> slot, FILLING or READY
        self._ready: set[int] = set()

    def next_fill(self) -> tuple[int, int] | None:
        """The next (unit, slot) to fill, now FILLING; None while no slot is free or nothing is missing."""
        streamed = self._next_streamed()
        if self._unfilled and (streamed is None or self._unfilled[0] < streamed):
            unit = self._unfilled.popleft()
            return unit, self._pinned[unit]
        if streamed is None:
            return None
        slot = self._free.popleft()
        self._held[streamed] = slot
        self._cursor = (self._cursor + 1) % len(self._streamed)
        return streamed, slot

    def _next_streamed(self) -> int | None:
        """The streamed unit to fetch next, where there is a slot for it and it is not there already."""
        if not self._free or len(self._passed_on) == len(self._streamed):
            return None
        while self._streamed[self._cursor] in self._passed_on:
            self._cursor = (self._cursor + 1) % len(self._streamed)
        unit = self._streamed[self._cursor]
        return None if unit in self._held else unit

    def filled(self, unit: int) -> None:
        assert unit not in self._ready, f"unit {unit} filled twice"
        assert unit in self._pinned or unit in self._held, f"unit {unit} was not asked for"
        self._ready.add(unit)

    def slot_of(self, unit: int) -> int | None:
        """The slot of a READY unit, else None."""
        if unit not in self._ready:
            return None
        return self._pinned[unit] if unit in self._pinned else self._held[unit]

    def rewind(self) -> None:
        """Starts over with the first streamed unit; the first ones that are READY stay, the others' slots are free.
        What was passed on is lost. No slot may be FILLING."""
        assert self._held.keys() <= self._ready, "a slot is still being filled"
        self._passed_on.clear()
        if self._stays():
            return
        kept = 0
        while kept < len(self._streamed) and self._streamed[kept] in self._held:
            kept += 1
        for unit in set(self._held) - set(self._streamed[:kept]):
            self._ready.remove(unit)
            self._free.append(self._held.pop(unit))
        self._cursor = kept

    def reset(self) -> None:
        """All slots are empty: what was in them is lost, what was on its way will not come."""
        self._unfilled = deque(self._pinned)
        self._free.extend(self._held.values())
        self._held.clear()
        self._ready.clear()
        self._passed_on.clear()
        self._cursor = 0

    def _stays(self) -> bool:
        """There is a slot for every streamed unit: none is ever given up."""
        return len(self._held) + len(self._free) >= len(self._streamed)

    def release(self, unit: int) -> None:
        """No reader needs the unit before the next pass."""
        assert unit in self._ready, f"unit {unit} released before it was filled"
        if unit in self._pinned or self._stays():
            return
        self._ready.remove(unit)
        self._free.append(self._held.pop(unit))
        if unit in self._once:
            self._passed_on.add(unit)

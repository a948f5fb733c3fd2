"""A sequence that makes room for others, on disk: pure logic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Parked:
    """Where the K and V of a sequence's first `stored` tokens are, as far as later tokens see them, and its state.

    Attributes:
        firsts: by group, the number of the first page that is there.
        slots: by group, of that page and those behind it.
        state_slots: of the state, where it has one.
        checksums: of all of these slots, in that order; none until all is written.
    """

    stored: int
    firsts: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...]
    state_slots: tuple[int, ...]
    checksums: tuple[int, ...] = ()

    @property
    def all_slots(self) -> tuple[int, ...]:
        return (*(slot for slots in self.slots for slot in slots), *self.state_slots)

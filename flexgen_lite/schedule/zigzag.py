"""The zig-zag order as a state machine: told what is finished, it answers with the next orders. No I/O, no clock.

A pass takes every micro-batch k through all layers, column by column: all k of column j, then column j + 1. A column is
an attention call with what leads to it: of a layer that makes one call, as most do, the only one.

    segment(j, k)  needs the layer of column j at hand and attention(j - 1, k); finishes column j - 1 and runs on up to
                   the attention call of column j. segment(C, k) finishes the forward and samples. While the layer of
                   column j is not at hand, the part up to its entry may run alone.
    attend(j, k)   needs segment(j, k); runs on every attention worker that holds sequences of k.
    load(l)        needs a free host slot; upload(l) a free device slot and layer l in the host's.

This grants. Which of the granted segments runs next is SegmentQueue's to say, in the compute worker (segment_queue.py),
and which layer is read next SlotRing's (slot_ring.py). A micro-batch takes its columns in order: its forward is the
model's own.

Segments are granted as soon as their weights are at hand; the compute worker and the attention workers tell each other
when a segment or an attention is done (doorbells.py, segment_queue.py), and the schedule afterwards. A layer's slot is
released when the last micro-batch has left the layer. There is no barrier: each dependency is its own event, so
loads, copies, attention and products of different layers and micro-batches overlap.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from flexgen_lite.schedule.slot_ring import SlotRing


@dataclass(frozen=True, slots=True)
class LoadUnit:
    unit: int
    slot: int


@dataclass(frozen=True, slots=True)
class UploadUnit:
    unit: int
    slot: int
    device_slot: int


@dataclass(frozen=True, slots=True)
class RunColumns:
    """Segments of every micro-batch in columns `column`, `column` + 1, ...; `slots` hold their layers' weights."""

    column: int
    slots: tuple[int, ...]  # -1 for the last segment, which needs none


Order = LoadUnit | UploadUnit | RunColumns


class Schedule:
    """Orders for one compute worker, one loader and several attention workers.

    Args:
        layers: the layer of each column, from 0 on without a gap. The last of them plus one is the unit of everything
            outside the layers, which is needed from the first segment to the last.
        host: slots that the loader fills; holds units 0 .. L.
        device: slots that uploads fill, or None where layers are used where the loader put them.
        stops: columns without attention.
        beside: layer -> unit of its own in a slot of the host's that its segments need as well.
    """

    def __init__(
        self,
        layers: Sequence[int],
        host: SlotRing,
        device: SlotRing | None = None,
        stops: Collection[int] = (),
        beside: Mapping[int, int] | None = None,
    ) -> None:
        self.num_columns = len(layers)
        self._stops = frozenset(stops)
        self._layers = tuple(layers)
        self._outside = layers[-1] + 1
        self._host = host
        self._device = device
        self._beside = beside or {}
        self._to_upload: dict[int, int] = {}  # unit -> device slot that waits for it
        self._parts: list[tuple[int, ...]] = []
        self._granted = 0  # columns of segments that were granted in this pass
        self._next: list[int] = []  # first segment of each micro-batch that is not reported as done
        self._attended: list[dict[int, int]] = []  # per micro-batch and attention worker: columns reported as done
        self._left: list[int] = []  # columns that each micro-batch has left
        self._leavers: list[int] = []  # per layer: micro-batches that have left it
        self._suspended = False

    # ------------------------------------------------------------------------------------------------ events

    def start(self) -> list[Order]:
        """The first loads; to be called once."""
        return self._advance()

    def begin_pass(self, parts: Sequence[tuple[int, ...]]) -> list[Order]:
        """`parts[k]`: the attention workers that hold sequences of micro-batch k."""
        assert self.pass_done, "the last pass is not over"
        self._parts = list(parts)
        self._granted = 0
        self._next = [0] * len(parts)
        self._attended = [dict.fromkeys(workers, self._behind_stops(0)) for workers in parts]
        self._left = [0] * len(parts)
        self._leavers = [0] * self._outside
        return self._advance()

    def suspend(self) -> None:
        """No orders from now on, whatever is told: the pass is to be given up."""
        self._suspended = True

    def abandon_pass(self) -> list[Order]:
        """Ends a suspended pass without a result, and the suspension. No load may be on its way; device slots, and
        uploads on their way, are lost."""
        self._suspended = False
        self._next = []
        self._to_upload.clear()
        self._host.rewind()
        if self._device is not None:
            self._device.reset()
        return self._advance()

    def loaded(self, unit: int) -> list[Order]:
        self._host.filled(unit)
        return self._advance()

    def uploaded(self, unit: int) -> list[Order]:
        assert self._device is not None
        self._device.filled(unit)
        self._host.release(unit)
        return self._advance()

    def segment_done(self, column: int, micro_batch: int) -> list[Order]:
        assert self._next[micro_batch] == column < self._granted
        self._next[micro_batch] = column + 1
        self._leave(column, micro_batch)
        return self._advance()

    def column_left(self, column: int, micro_batch: int) -> list[Order]:
        """The first part of segment(column, micro_batch) is done: column - 1 is finished."""
        assert self._next[micro_batch] == column > self._left[micro_batch]
        self._leave(column, micro_batch)
        return self._advance()

    def attended(self, column: int, micro_batch: int, worker: int) -> None:
        """An attention worker's part of attention(column, micro_batch) is done; only `waits_for` depends on it."""
        assert self._attended[micro_batch][worker] == column
        self._attended[micro_batch][worker] = self._behind_stops(column + 1)

    # ------------------------------------------------------------------------------------------------ state

    @property
    def stops(self) -> frozenset[int]:
        """Columns without attention."""
        return self._stops

    @property
    def pass_done(self) -> bool:
        return all(column == self.num_columns + 1 for column in self._next)

    def waits_for(self) -> tuple[bool, frozenset[int]]:
        """Whether the compute worker has a segment to run, and which attention workers have attention to compute."""
        compute, workers = False, set()
        for k, column in enumerate(self._next):
            missing = {worker for worker, done in self._attended[k].items() if done < column}
            workers |= missing if column <= self.num_columns else set()
            compute |= not missing and (column < self._granted or self._left[k] < column)
        return compute, frozenset(workers)

    def standing(self) -> str:
        """For error messages: what the pass stands at."""
        layers = (*self._layers, self._outside, self._outside)
        states = [f"micro-batch {k} before layer {layers[column]}" for k, column in enumerate(self._next)]
        return ", ".join(states) or "no pass"

    def _behind_stops(self, column: int) -> int:
        """The next column from `column` on that has attention."""
        while column in self._stops:
            column += 1
        return column

    def _leave(self, column: int, micro_batch: int) -> None:
        if self._left[micro_batch] == column:
            return
        self._left[micro_batch] = column
        layer = self._layers[column - 1]
        if column < self.num_columns and self._layers[column] == layer:
            return
        self._leavers[layer] += 1
        if self._leavers[layer] == len(self._parts):
            (self._device or self._host).release(layer)

    def _advance(self) -> list[Order]:
        orders: list[Order] = []
        if self._suspended:
            return orders
        while fill := self._host.next_fill():
            orders.append(LoadUnit(*fill))
        if self._device is not None:
            orders.extend(self._uploads(self._device))
        if not self.pass_done and (columns := self._columns(self._device or self._host)):
            orders.append(RunColumns(self._granted - len(columns), columns))
        return orders

    def _columns(self, weights: SlotRing) -> tuple[int, ...]:
        """Slots of the columns whose segments can be granted now."""
        slots: list[int] = []
        while self._granted <= self.num_columns and weights.slot_of(self._outside) is not None:
            slot = self._slot_of_layer(weights, self._layers[self._granted]) if self._granted < self.num_columns else -1
            if slot is None:
                break
            slots.append(slot)
            self._granted += 1
        return tuple(slots)

    def _slot_of_layer(self, weights: SlotRing, layer: int) -> int | None:
        """Where all that it needs is at hand."""
        beside = self._beside.get(layer)
        if beside is not None and self._host.slot_of(beside) is None:
            return None
        return weights.slot_of(layer)

    def _uploads(self, device: SlotRing) -> list[Order]:
        """Units that stay on the device may wait for one that the loader has not come to, behind others in the order of
        a pass: those go first."""
        while fill := device.next_fill():
            unit, device_slot = fill
            self._to_upload[unit] = device_slot
        at_hand = [(unit, slot) for unit in self._to_upload if (slot := self._host.slot_of(unit)) is not None]
        return [UploadUnit(unit, slot, self._to_upload.pop(unit)) for unit, slot in at_hand]

"""The zig-zag order as a state machine: told what is finished, it answers with the next orders. No I/O, no clock.

A pass takes every micro-batch k through all layers j, column by column: all k of layer j, then layer j + 1.

    segment(j, k)  needs layer j at hand and attention(j - 1, k); finishes layer j - 1 and runs layer j up to its
                   attention call. segment(L, k) finishes the forward and samples.
    attend(j, k)   needs segment(j, k); runs on every attention worker that holds sequences of k.
    load(j)        needs a free host slot; upload(j) a free device slot and the layer in the host's.

A layer's slot is released when the last micro-batch has passed segment(j + 1). There is no barrier: each dependency is
its own event, so loads, copies, attention and products of different layers and micro-batches overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_lite.slot_ring import SlotRing


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
class RunSegment:
    layer: int
    micro_batch: int
    slot: int


@dataclass(frozen=True, slots=True)
class RunAttention:
    layer: int
    micro_batch: int
    workers: tuple[int, ...]


Order = LoadUnit | UploadUnit | RunSegment | RunAttention


class Schedule:
    """Orders for one compute worker, one loader and several attention workers.

    Args:
        num_layers: L; unit L is everything outside the layers, needed from the first segment to the last.
        host: slots that the loader fills; holds units 0 .. L.
        device: slots that uploads fill, or None where layers are used where the loader put them.
        compute_credit: segments that may be with the compute worker at a time (2 hides the round trip).
    """

    def __init__(
        self, num_layers: int, host: SlotRing, device: SlotRing | None = None, compute_credit: int = 2
    ) -> None:
        self.num_layers = num_layers
        self._host = host
        self._device = device
        self._compute_credit = compute_credit
        self._pending_upload: tuple[int, int] | None = None
        self._parts: list[tuple[int, ...]] = []
        self._next_layer: list[int] = []  # next segment of each micro-batch
        self._blocked: list[int] = []  # what the next segment still waits for: attention workers, or its own end
        self._passed: list[int] = []  # per segment column: micro-batches that have passed it
        self._in_flight = 0

    # ------------------------------------------------------------------------------------------------ events

    def start(self) -> list[Order]:
        """The first loads; to be called once."""
        return self._advance()

    def begin_pass(self, parts: Sequence[tuple[int, ...]]) -> list[Order]:
        """`parts[k]`: the attention workers that hold sequences of micro-batch k."""
        assert self.pass_done, "the last pass is not over"
        self._parts = list(parts)
        self._next_layer = [0] * len(parts)
        self._blocked = [0] * len(parts)
        self._passed = [0] * (self.num_layers + 1)
        return self._advance()

    def loaded(self, unit: int) -> list[Order]:
        self._host.filled(unit)
        return self._advance()

    def uploaded(self, unit: int) -> list[Order]:
        assert self._device is not None
        self._device.filled(unit)
        self._host.release(unit)
        return self._advance()

    def segment_done(self, layer: int, micro_batch: int) -> list[Order]:
        assert self._next_layer[micro_batch] == layer and self._blocked[micro_batch] == 1
        self._in_flight -= 1
        self._next_layer[micro_batch] = layer + 1
        self._passed[layer] += 1
        if layer > 0 and self._passed[layer] == len(self._parts):
            (self._device or self._host).release(layer - 1)
        if layer == self.num_layers:
            self._blocked[micro_batch] = 0
            return self._advance()
        workers = self._parts[micro_batch]
        self._blocked[micro_batch] = len(workers)
        return [RunAttention(layer, micro_batch, workers), *self._advance()]

    def attended(self, layer: int, micro_batch: int) -> list[Order]:
        """One worker has finished its part of attention(layer, micro_batch)."""
        assert self._next_layer[micro_batch] == layer + 1 and self._blocked[micro_batch] > 0
        self._blocked[micro_batch] -= 1
        return self._advance()

    # ------------------------------------------------------------------------------------------------ state

    @property
    def pass_done(self) -> bool:
        return all(layer == self.num_layers + 1 for layer in self._next_layer)

    def waiting_for(self) -> str:
        """For error messages: what the pass stands at."""
        states = [f"micro-batch {k} before layer {layer}" for k, layer in enumerate(self._next_layer)]
        return ", ".join(states) or "no pass"

    def _advance(self) -> list[Order]:
        orders: list[Order] = []
        while fill := self._host.next_fill():
            orders.append(LoadUnit(*fill))
        if self._device is not None:
            orders.extend(self._uploads(self._device))
        while self._in_flight < self._compute_credit and (segment := self._next_segment()):
            self._in_flight += 1
            self._blocked[segment.micro_batch] = 1
            orders.append(segment)
        return orders

    def _uploads(self, device: SlotRing) -> list[Order]:
        orders: list[Order] = []
        while True:
            self._pending_upload = self._pending_upload or device.next_fill()
            if self._pending_upload is None:
                return orders
            unit, device_slot = self._pending_upload
            slot = self._host.slot_of(unit)
            if slot is None:
                return orders
            orders.append(UploadUnit(unit, slot, device_slot))
            self._pending_upload = None

    def _next_segment(self) -> RunSegment | None:
        ready = [
            (layer, k) for k, layer in enumerate(self._next_layer) if layer <= self.num_layers and not self._blocked[k]
        ]
        weights = self._device or self._host
        if not ready or weights.slot_of(self.num_layers) is None:
            return None
        layer, k = min(ready)
        if layer == self.num_layers:
            return RunSegment(layer, k, -1)
        slot = weights.slot_of(layer)
        return None if slot is None else RunSegment(layer, k, slot)

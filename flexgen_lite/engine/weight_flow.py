"""Carries out what the schedule orders about weights, and knows what is on its way when a worker is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flexgen_lite.engine.worker_supervisor import WorkerSupervisor
from flexgen_lite.schedule.zigzag import LoadUnit, Order, RunColumns, Schedule, UploadUnit
from flexgen_lite.wire import worker_messages


class WeightFlow:
    """A unit goes disk -> host slot (Load), there into the order that products want where it stays (Pack), or from the
    host slot to a device slot (Upload).

    Args:
        packed: units that are packed once loaded.
        there: units that another engine has loaded, and packed, where they lie.
        copy_head: see worker_messages.Pack.
        on_columns: is given the orders to compute.
    """

    def __init__(
        self,
        workers: WorkerSupervisor,
        schedule: Schedule,
        packed: frozenset[int],
        there: frozenset[int],
        copy_head: bool,
        on_columns: Callable[[RunColumns], None],
    ) -> None:
        self._workers = workers
        self._schedule = schedule
        self._packed = packed
        self._there = there
        self._copy_head = copy_head
        self._on_columns = on_columns
        self._loader_takes_orders = self._compute_takes_orders = False
        self._loading: dict[int, int] = {}  # unit -> slot, of what was ordered and is not done
        self._to_pack: dict[int, int] = {}
        self._packing: dict[int, int] = {}
        self._in_order: dict[int, int] = {}
        self._taking_over: set[int] = set()  # what is in order, and the compute worker has not said that it knows
        self._uploading: set[int] = set()

    @property
    def is_quiet(self) -> bool:
        """Nothing is on its way."""
        return not (self._loading or self._to_pack or self._packing or self._taking_over or self._uploading)

    def carry_out(self, orders: Iterable[Order]) -> None:
        for order in orders:
            match order:
                case RunColumns():
                    self._on_columns(order)
                case LoadUnit():
                    self._load(order.unit, order.slot)
                case UploadUnit():
                    self._uploading.add(order.unit)
                    self._workers.compute.send(worker_messages.Upload(order.unit, order.slot, order.device_slot))

    # ------------------------------------------------------------------------------------------------ what is done

    def loaded(self, message: worker_messages.Loaded) -> None:
        del self._loading[message.unit]
        if message.unit in self._packed:
            self._pack(message.unit, message.slot)
        else:
            self.carry_out(self._schedule.loaded(message.unit))

    def was_packed(self, message: worker_messages.Packed) -> None:
        self._taking_over.discard(message.unit)
        if message.unit in self._packing:  # else a new compute worker has taken over what was in order already
            self._in_order[message.unit] = self._packing.pop(message.unit)
            self.carry_out(self._schedule.loaded(message.unit))

    def uploaded(self, message: worker_messages.Uploaded) -> None:
        self._uploading.discard(message.unit)
        self.carry_out(self._schedule.uploaded(message.unit))

    # ------------------------------------------------------------------------------------------------ who is there

    def loader_attached(self) -> None:
        """The loader has its arena: what was ordered of the one before it is ordered again."""
        self._loader_takes_orders = True
        for unit, slot in self._loading.items():
            self._workers.loader.send(worker_messages.Load(unit, slot))

    def loader_lost(self) -> None:
        self._loader_takes_orders = False

    def compute_attached(self) -> None:
        """The compute worker has its arenas."""
        self._compute_takes_orders = True
        for unit, slot in self._in_order.items():
            self._take_over(unit, slot)
        waiting, self._to_pack = self._to_pack, {}
        for unit, slot in waiting.items():
            self._pack(unit, slot)

    def compute_lost(self) -> None:
        """Weights that it was packing lie in no order: they are loaded again."""
        self._compute_takes_orders = False
        self._uploading.clear()
        self._taking_over.clear()
        half_done, self._packing = self._packing, {}
        for unit, slot in half_done.items():
            self._load(unit, slot)

    # ------------------------------------------------------------------------------------------------ inside

    def _load(self, unit: int, slot: int) -> None:
        if unit in self._there:
            self._use(unit, slot)
            return
        self._loading[unit] = slot
        if self._loader_takes_orders:
            self._workers.loader.send(worker_messages.Load(unit, slot))

    def _use(self, unit: int, slot: int) -> None:
        """A unit that is there. What the compute worker is told of it comes before whatever needs it."""
        if unit in self._packed:
            self._in_order[unit] = slot
            if self._compute_takes_orders:
                self._take_over(unit, slot)
        self.carry_out(self._schedule.loaded(unit))

    def _take_over(self, unit: int, slot: int) -> None:
        self._taking_over.add(unit)
        self._workers.compute.send(worker_messages.Pack(unit, slot, self._copy_head, in_order=True))

    def _pack(self, unit: int, slot: int) -> None:
        if not self._compute_takes_orders:
            self._to_pack[unit] = slot
            return
        self._packing[unit] = slot
        self._workers.compute.send(worker_messages.Pack(unit, slot, self._copy_head, in_order=False))

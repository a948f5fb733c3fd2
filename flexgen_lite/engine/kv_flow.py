"""Carries out what is ordered about KV on disk, and knows what is on its way when the loader is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from flexgen_lite.engine.events import log
from flexgen_lite.engine.stats import EngineStats
from flexgen_lite.engine.worker_supervisor import WorkerSupervisor
from flexgen_lite.queue.client_jobs import Answer
from flexgen_lite.queue.requests import Requests
from flexgen_lite.wire.kv_on_disk import FetchBlocks, FetchKv, KvMoved, MoveKv, ParkKv, PrefixesOpened, StoreBlocks

NAMES = {ParkKv: "park", FetchKv: "fetch", StoreBlocks: "store prefixes", FetchBlocks: "fetch prefixes"}


class KvFlow:
    """Sequences that were being written or read when a loader was lost are so again by the next one: their pages are
    theirs until they are answered, and the file of parked sequences is the coordinator's. The file of prefixes was the
    lost one's: what it was to do there has failed.

    Args:
        answer: is given what clients are to be told.
    """

    def __init__(
        self,
        workers: WorkerSupervisor,
        requests: Requests,
        stats: EngineStats,
        answer: Callable[[Iterable[Answer]], None],
    ) -> None:
        self._workers = workers
        self._requests = requests
        self._disk = requests.disk
        self._stats = stats
        self._answer = answer
        self._open: dict[int, MoveKv] = {}  # orders without an answer, by ticket
        self._loader_takes_orders = False
        self._told: set[str] = set()

    def send(self) -> None:
        """What has been ordered since the last time."""
        if self._disk is None:
            return
        for order in self._disk.take_orders():
            self._open[order.ticket] = order
            if self._loader_takes_orders:
                self._workers.loader.send(order)

    def moved(self, message: KvMoved) -> None:
        order = self._open.pop(message.ticket)
        what = NAMES[type(order)]
        if message.error and what not in self._told:  # of each kind once: a disk that is full stays so
            self._told.add(what)
            log(f"warning: kv_disk: {what}: {message.error}; what is not on disk is computed again")
        self._stats.kv_moved(message, what, isinstance(order, ParkKv | StoreBlocks))
        self._answer(self._requests.kv_moved(message))
        self.send()

    def opened(self, message: PrefixesOpened) -> None:
        assert self._disk is not None, "KV on disk was not asked for"
        if message.note and message.note not in self._told:
            self._told.add(message.note)
            log(f"warning: {message.note}")
        self._disk.open_prefixes([(block.key, block.slot) for block in message.blocks], message.usable)
        self.send()

    def loader_attached(self) -> None:
        """What was ordered of the loader before this one is ordered again."""
        self._loader_takes_orders = True
        for order in self._open.values():
            self._workers.loader.send(order)

    def loader_lost(self) -> None:
        """Its process is gone, and writes nothing any more."""
        self._loader_takes_orders = False
        if self._disk is None:
            return
        self._disk.close_prefixes()
        now = time.monotonic_ns()
        for order in [order for order in self._open.values() if isinstance(order, StoreBlocks | FetchBlocks)]:
            self.moved(KvMoved(order.ticket, (), 0, now, now, "the disk loader was lost"))

"""The disk loader process: reads a unit's bytes into a weight slot, ahead of need."""

from __future__ import annotations

import time

from flexgen_lite.memory.arena import map_arena, map_weights
from flexgen_lite.memory.usage import resident_bytes
from flexgen_lite.wire import worker_messages
from flexgen_lite.wire.kv_on_disk import KvDiskSpec, MoveKv
from flexgen_lite.workers import serve
from flexgen_lite.workers.loader.kv_disk import KvDisk
from flexgen_lite.workers.loader.state import LoaderState


class Loader(serve.Worker):
    def __init__(self, context: serve.Context) -> None:
        self._context = context
        self._state: LoaderState | None = None
        self._kv_disk: KvDisk | None = None

    def handle(self, message: worker_messages.AttachLoader | worker_messages.Load | MoveKv) -> None:
        if isinstance(message, worker_messages.AttachLoader):
            serve.set_affinity(message.cpus)
            arena = map_weights(self._context.arenas, message.arena_bytes, message.shared)
            self._state = LoaderState(message, arena)
            self._context.post(worker_messages.Ready(sum(resident_bytes())))
            if message.kv_disk is not None:
                self._kv_disk = self._open_kv_disk(message.kv_disk)
            return
        if not isinstance(message, worker_messages.Load):
            assert self._kv_disk is not None, "KV on disk was not asked for"
            self._kv_disk.order(message)
            return
        assert self._state is not None, "a load before the loader was attached"
        start_ns = time.monotonic_ns()
        num_bytes = self._state.load(message)
        end_ns = time.monotonic_ns()
        self._context.post(worker_messages.Loaded(message.unit, message.slot, num_bytes, start_ns, end_ns))

    def _open_kv_disk(self, spec: KvDiskSpec) -> KvDisk:
        arenas = self._context.arenas
        kv = map_arena(arenas["kv"], spec.kv_bytes)
        states = map_arena(arenas["states"], spec.states_bytes) if spec.states_bytes else None
        return KvDisk(spec, kv, states, arenas["parked"], self._context.post)


def main() -> None:
    serve.run(worker_messages.ToLoader, worker_messages.FromLoader, Loader)

"""An attention worker process: owns the KV pages of its share of the sequences."""

from __future__ import annotations

import threading
import time
from collections import deque

from flexgen_lite.memory.arena import map_arena
from flexgen_lite.memory.usage import give_back_memory, resident_bytes
from flexgen_lite.wire import worker_messages
from flexgen_lite.wire.doorbells import Note, ring
from flexgen_lite.workers import serve
from flexgen_lite.workers.attention.state import AttentionState
from flexgen_lite.workers.attention.warm_up import warm_up
from flexgen_lite.workers.simd import LANES


class AttentionWorker(serve.Worker):
    def __init__(self, context: serve.Context) -> None:
        self._context = context
        self._state: AttentionState | None = None
        self._prefaulted = threading.Event()  # enough, or no more time for it
        self._pass_id = -1
        self._abandoned = -1  # the last pass that was dropped: its notes are void
        self._num_columns = 0
        self._left = 0  # attentions of the pass that are still to come
        self._notes: deque[Note] = deque()  # what the compute worker asked for, in order

    def handle(
        self,
        message: worker_messages.WarmUp
        | worker_messages.AttachAttention
        | worker_messages.BeginAttention
        | worker_messages.Abandon,
    ) -> None:
        if isinstance(message, worker_messages.WarmUp):
            warm_up(message.dtype, message.kv_dtype)
            give_back_memory()
            self._context.post(worker_messages.WarmedUp(resident_bytes()[0], LANES))
            return
        if isinstance(message, worker_messages.Abandon):
            self._abandoned = self._pass_id
            self._context.forget_items()
            self._context.post(worker_messages.Abandoned())
            return
        if isinstance(message, worker_messages.AttachAttention):
            serve.set_affinity(message.cpus)
            kv = map_arena(self._context.arenas["kv"], message.kv.arena_bytes)
            exchange = map_arena(
                self._context.arenas["exchange"], message.exchange.num_regions * message.exchange.region_bytes
            )
            warm_up(message.exchange.dtype, message.kv.dtype)
            self._state = AttentionState(message, kv, exchange)
            self._num_columns = len(message.columns) - message.num_stops
            threading.Thread(target=self._state.prefault, args=(self._prefaulted,), daemon=True).start()
            self._context.post(worker_messages.Ready(sum(resident_bytes())))
            return
        assert self._state is not None, "work before the attention worker was attached"
        self._prefaulted.set()
        self._state.begin(message)
        self._pass_id = message.pass_id
        self._left = self._num_columns * len(message.batches)

    def heard(self, doorbell: str, note: Note) -> None:
        self._notes.append(note)

    def work(self) -> bool:
        """The oldest note's attention. Notes of a pass that has not begun here wait; those of an old one are void."""
        while self._notes and (self._notes[0].pass_id < self._pass_id or self._notes[0].pass_id <= self._abandoned):
            self._notes.popleft()
        if not self._notes or self._notes[0].pass_id > self._pass_id:
            return False
        assert self._state is not None
        note = self._notes.popleft()
        start_ns = time.monotonic_ns()
        self._state.attend(worker_messages.Attend(note.pass_id, note.column, note.micro_batch))
        ring(self._context.doorbells["compute"], note)
        self._left -= 1
        done = worker_messages.Attended(note.column, note.micro_batch, start_ns, time.monotonic_ns())
        self._context.tell(done, at_once=self._left == 0)
        return True

    def report(self, items: tuple[worker_messages.Attended, ...]) -> worker_messages.AttentionReport:
        return worker_messages.AttentionReport(self._pass_id, items)


def main() -> None:
    serve.run(worker_messages.ToAttention, worker_messages.FromAttention, AttentionWorker)

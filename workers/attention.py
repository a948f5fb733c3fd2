"""An attention worker process: owns the KV pages of its share of the sequences."""

from __future__ import annotations

import time

from flexgen_lite import messages
from flexgen_lite.arena import map_arena
from flexgen_lite.memory_use import resident_bytes
from flexgen_lite.workers import serve


class AttentionWorker:
    def __init__(self, context: serve.Context) -> None:
        self._context = context
        # Numba reads its thread count when it is imported, and it takes a while: import now, beside the other workers.
        from flexgen_lite.workers.attention_state import AttentionState

        self._make_state = AttentionState
        self._state: AttentionState | None = None

    def handle(self, message: messages.AttachAttention | messages.BeginAttention | messages.Attend) -> None:
        if isinstance(message, messages.AttachAttention):
            serve.set_affinity(message.cpus)
            kv = map_arena(self._context.arenas["kv"], message.kv.arena_bytes)
            exchange = map_arena(
                self._context.arenas["exchange"], message.exchange.num_regions * message.exchange.region_bytes
            )
            self._state = self._make_state(message, kv, exchange)
            self._state.warm_up()
            self._context.post(messages.Ready(sum(resident_bytes())))
            return
        assert self._state is not None, "work before the attention worker was attached"
        if isinstance(message, messages.BeginAttention):
            self._state.begin(message)
            return
        start_ns = time.monotonic_ns()
        self._state.attend(message)
        end_ns = time.monotonic_ns()
        self._context.post(messages.Attended(message.pass_id, message.layer, message.micro_batch, start_ns, end_ns))


if __name__ == "__main__":
    serve.run(messages.ToAttention, messages.FromAttention, AttentionWorker)

"""A coordinator that serves nobody: it has the workers do what passes are made of, and takes the time.

Model, workers, arenas, messages and kernels are those of any engine; only some layers have slots, and most passes end
behind the first columns. What the times come to is cost/fit.py's to say.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.fit import rates_of
from flexgen_lite.cost.kinds import columns_to_measure
from flexgen_lite.engine.calibration import Calibration
from flexgen_lite.engine.coordinator import Stopping
from flexgen_lite.engine.event_loop import EventLoop
from flexgen_lite.engine.events import log
from flexgen_lite.engine.measuring import MOST_COLUMNS, Measuring
from flexgen_lite.engine.setup import Setup, open_tokenizer, order_to_open, set_up
from flexgen_lite.engine.worker_process import WorkerDied, WorkerProcess
from flexgen_lite.engine.worker_supervisor import WorkerSupervisor
from flexgen_lite.memory.arena import Arena
from flexgen_lite.memory.usage import MemoryUse, give_back_memory, resident_bytes
from flexgen_lite.plan.machine import inspect_machine
from flexgen_lite.plan.need import DEVICE_RING, Measured, num_attention_workers
from flexgen_lite.plan.plan import PlanError
from flexgen_lite.queue.micro_batch import MicroBatch
from flexgen_lite.wire import worker_messages

WEIGHTS_BYTES = 1200 << 20  # of layers that have slots: more than the last cache holds


@dataclass(slots=True)
class PassSpans:
    """What is awaited of one: times as they come."""

    segments: dict[tuple[int, int], tuple[int, int]]  # (column, micro-batch) -> start, end, ns
    attention: dict[tuple[int, int, int], tuple[int, int]]  # with the worker
    left: dict[tuple[int, int], tuple[int, int]]  # of segments whose part behind the attention ran by itself


class Calibrator:
    """`with Calibrator(config, run_dir) as calibrator: calibrator.run()`; no process is left behind."""

    def __init__(self, config: EngineConfig, run_dir: Path) -> None:
        self._config = config
        self._machine = inspect_machine()
        self._arenas = {name: Arena(name) for name in ("weights", "kv", "exchange", "states")}
        self._memory = MemoryUse(self._arenas.values())
        self._loop = EventLoop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._workers = WorkerSupervisor(
            self._loop, self._context, run_dir, self._arenas, self._memory, self._handle,
            lambda name, line: log(f"{name}: {line}"), self._lost,
        )  # fmt: skip
        self._opened: worker_messages.ModelOpened | None = None
        self._warm: dict[str, int] = {}
        self._loads: list[worker_messages.Loaded] = []
        self._packed = 0  # units
        self._uploads: list[worker_messages.Uploaded] = []
        self._abandoned = 0
        self._pass_id = 0
        self._pass = PassSpans({}, {}, {})
        self._go_on_loading: Callable[[], None] = lambda: None
        self._deadline = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._workers.stop()
        self._memory.close()
        self._context.destroy(linger=500)
        for arena in self._arenas.values():
            arena.close()

    def run(self) -> Calibration:
        """Raises WorkerDied, Stopping, or PlanError where memory does not hold what is to be measured."""
        self._loop.watch(sys.stdin.fileno(), self._stop)
        self._deadline = time.monotonic() + self._config.start_timeout
        self._workers.start(num_attention_workers(self._config, self._machine))
        self._workers.compute.send(order_to_open(self._config, self._config.dtype))
        self._until(lambda: self._opened is not None)
        opened = self._opened
        assert opened is not None
        attention = [worker for worker in self._workers if worker.kind == "attention"]
        for worker in attention:
            dtype = opened.spec.dtype
            worker.send(worker_messages.WarmUp(dtype, self._config.stored_kv_dtype(dtype)))
        self._until(lambda: len(self._warm) == len(attention))
        tokenizer = open_tokenizer(opened.tokenizer_file)  # a coordinator has it: it takes what it takes
        give_back_memory()
        processes = Measured(opened.resident_bytes, resident_bytes()[0], max(self._warm.values()))
        del tokenizer
        setup = self._set_up(opened, processes)
        for name, num_bytes in setup.arena_bytes.items():
            self._arenas[name].resize(num_bytes)
        self._workers.loader.send(setup.for_loader(self._config.load_format, False))
        for worker in attention:
            worker.send(setup.for_attention(worker.index))
        self._workers.compute.send(setup.for_compute())
        self._until(lambda: not self._workers.not_ready)
        times = Measuring(self, setup).run()
        text = Path(opened.tokenizer_file).read_text(encoding="utf-8") if opened.tokenizer_file else ""
        return Calibration(opened, processes, self._machine, rates_of(opened.spec, times), text)

    def _set_up(self, opened: worker_messages.ModelOpened, processes: Measured) -> Setup:
        """A plan with slots for some layers, as many as the budget allows of those that are wanted beside the rows and
        sequences that an engine would have."""
        spec = opened.spec
        layer_bytes = max(unit.num_bytes for unit in spec.units[:-1])
        layers = spec.columns[columns_to_measure(spec, MOST_COLUMNS) - 1] + 1
        slots = min(spec.num_layers, max(2, layers, -(-WEIGHTS_BYTES // layer_bytes)) + 1)
        pages = 0
        own: dict[str, Any] = {"max_sequences": None, "micro_batch_tokens": None, "micro_batches": 2}
        if self._config.ram is not None:
            plan = set_up(opened, self._config, self._machine, None, processes).plan
            rows, pages = plan.micro_batch_tokens, plan.num_pages
            several = min(2, plan.micro_batches)
            own = {"max_sequences": plan.max_sequences, "micro_batch_tokens": rows, "micro_batches": several}
        if self._config.cpu_projections == "qkv":  # of no layer that stays on the device
            own["device_slots"] = min(self._config.device_slots or DEVICE_RING, DEVICE_RING)
        while True:
            config = self._config.model_copy(update=own | {"layer_slots": slots if slots < spec.num_layers else None})
            try:
                setup = set_up(opened, config, self._machine, None, processes)
            except PlanError:
                if slots <= min(2, spec.num_layers):
                    raise
            else:
                fits = len(setup.plan.slot_offsets) - 1 >= slots and setup.plan.num_pages >= pages
                if fits or slots <= min(2, spec.num_layers):
                    return setup
            slots -= 1

    # ------------------------------------------------------------------------------------------------ messages

    def _handle(self, worker: WorkerProcess, message: Any) -> None:
        match message:
            case worker_messages.ModelOpened():
                self._opened = message
            case worker_messages.WarmedUp():
                self._warm[worker.name] = message.resident_bytes
            case worker_messages.Ready():
                self._workers.ready(worker)
            case worker_messages.Loaded():
                self._loads.append(message)
                self._go_on_loading()
            case worker_messages.Packed():
                self._packed += 1
            case worker_messages.Uploaded():
                self._uploads.append(message)
            case worker_messages.Abandoned():
                self._abandoned += 1
            case worker_messages.ComputeReport() if message.pass_id == self._pass_id:
                for done in message.done:
                    spans = self._pass.left if done.left_only else self._pass.segments
                    spans[done.column, done.micro_batch] = done.start_ns, done.end_ns
            case worker_messages.AttentionReport() if message.pass_id == self._pass_id:
                for part in message.done:
                    self._pass.attention[part.column, part.micro_batch, worker.index] = part.start_ns, part.end_ns

    def _lost(self, worker: WorkerProcess, error: WorkerDied) -> None:
        raise error

    def _stop(self) -> None:
        raise Stopping

    def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise WorkerDied("the workers did not answer in time: raise start_timeout if they were only slow")
            self._loop.step(int(left * 1000) + 1)

    # ------------------------------------------------------------------------------------------------ orders

    def give_time(self, seconds: float) -> None:
        """For the next answers."""
        self._deadline = time.monotonic() + seconds

    def load(self, unit: int, slot: int) -> float:
        """Seconds that it took."""
        count = len(self._loads)
        self._workers.loader.send(worker_messages.Load(unit, slot))
        self._until(lambda: len(self._loads) > count)
        return (self._loads[-1].end_ns - self._loads[-1].start_ns) / 1e9

    def pack(self, unit: int, slot: int, in_order: bool) -> None:
        count = self._packed
        self._workers.compute.send(worker_messages.Pack(unit, slot, False, in_order))
        self._until(lambda: self._packed > count)

    def upload(self, unit: int, slot: int, device_slot: int) -> float:
        count = len(self._uploads)
        self._workers.compute.send(worker_messages.Upload(unit, slot, device_slot))
        self._until(lambda: len(self._uploads) > count)
        return (self._uploads[-1].end_ns - self._uploads[-1].start_ns) / 1e9

    def load_on_and_on(self, unit: int, slot: int) -> Callable[[], list[float]]:
        """Has the loader read a unit again and again; what is returned stops it, and gives the seconds of each."""
        first = len(self._loads)

        def again() -> None:
            self._workers.loader.send(worker_messages.Load(unit, slot))

        def stop() -> list[float]:
            self._go_on_loading = lambda: None
            count = len(self._loads)
            self._until(lambda: len(self._loads) > count)
            return [(one.end_ns - one.start_ns) / 1e9 for one in self._loads[first:-1]]

        self._go_on_loading = again
        again()
        return stop

    def run_pass(
        self, batches: Sequence[MicroBatch], slots: Sequence[int], setup: Setup, by_layer: bool = False
    ) -> tuple[PassSpans, int]:
        """The segments whose layers' weights are in `slots`, and the attention behind each but the model's last; with
        when it was ordered. `by_layer`: a layer's are ordered when the one before has been left."""
        plan, num_columns = setup.plan, len(setup.spec.columns)
        self._pass_id += 1
        self._pass = PassSpans({}, {}, {})
        ordered = time.monotonic_ns()
        token_batches = tuple(batch.token_batch(k) for k, batch in enumerate(batches))
        self._workers.compute.send(
            worker_messages.BeginCompute(self._pass_id, plan.compute_threads, token_batches), expects_answer=False
        )
        attention = [worker for worker in self._workers if worker.kind == "attention"]
        for worker in attention:
            spans = tuple(b.kv_batch(k, worker.index) for k, b in enumerate(batches) if worker.index in b.workers())
            worker.send(
                worker_messages.BeginAttention(self._pass_id, plan.attention_threads, spans), expects_answer=False
            )
        found = self._pass
        starts = _layer_starts(setup.spec.columns, len(slots)) if by_layer else [0]
        for start, stop in pairwise((*starts, len(slots))):
            if start:
                self._until(lambda start=start: all((start, k) in found.left for k in range(len(batches))))  # type: ignore[misc]
            order = worker_messages.Segments(self._pass_id, start, tuple(slots[start:stop]))
            self._workers.compute.send(order, expects_answer=False)
        attended = [column for column in range(min(len(slots), num_columns)) if column not in setup.spec.stops]
        parts = sum(len(batch.workers()) for batch in batches) * len(attended)
        self._until(lambda: len(found.segments) == len(slots) * len(batches) and len(found.attention) == parts)
        if len(slots) <= num_columns:
            self._abandoned = 0
            self._workers.compute.send(worker_messages.Abandon())
            for worker in attention:
                worker.send(worker_messages.Abandon())
            self._until(lambda: self._abandoned == 1 + len(attention))
        return found, ordered


def _layer_starts(layers: Sequence[int], count: int) -> list[int]:
    """The first columns of their layers, of the first `count` ones."""
    return [column for column in range(min(count, len(layers))) if column == 0 or layers[column] != layers[column - 1]]

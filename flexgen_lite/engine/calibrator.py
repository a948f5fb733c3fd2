"""A coordinator that serves nobody: it has the workers do what passes are made of, and takes the time.

Model, workers, arenas, messages and kernels are those of any engine; only some layers have slots, and most passes end
behind the first columns. What the times come to is cost/fit.py's to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.kinds import columns_to_measure, layer_kinds
from flexgen_lite.cost.measured import LoadTimes, PassShape, PassTimes, Times
from flexgen_lite.engine.event_loop import EventLoop
from flexgen_lite.engine.events import log
from flexgen_lite.engine.setup import Setup, order_to_open, set_up
from flexgen_lite.engine.worker_process import WorkerDied, WorkerProcess
from flexgen_lite.engine.worker_supervisor import WorkerSupervisor
from flexgen_lite.memory.arena import Arena
from flexgen_lite.memory.usage import MemoryUse, resident_bytes
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.plan.machine import inspect_machine
from flexgen_lite.plan.need import Measured, num_attention_workers
from flexgen_lite.plan.plan import PlanError
from flexgen_lite.queue.batching import MicroBatch, Piece
from flexgen_lite.queue.page_table import PageTable
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.wire import worker_messages
from flexgen_lite.wire.sampling import WireParams

WEIGHTS_BYTES = 1200 << 20  # of layers that have slots: more than the last cache holds
MOST_COLUMNS = 16
FEW_COLUMNS = 4  # of passes with many rows, whose weights are in no cache anyway
MANY_ROWS = 256
SINGLES = (1, 4, 16, 32, 64, 128, 256)
PROMPT_ROWS = (16, 64, 128, 256, 512, 1024, 2048)
SHORT_PROMPT = 64
SHORT_CONTEXT, LONG_CONTEXT = 32, 1024
SECONDS = 45.0  # for all passes; what is left of the list then is left out
LONGEST_PASS = 8.0
LOADED_AGAIN = 4  # units at most, of each kind
PARAMS = WireParams(
    max_tokens=1 << 30, min_tokens=0, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop_token_ids=(), ignore_eos=True,
    skip_special_tokens=True,
)  # fmt: skip


@dataclass(slots=True)
class _Pass:
    """What is awaited of one: times as they come."""

    segments: dict[tuple[int, int], tuple[int, int]]  # (column, micro-batch) -> start, end, ns
    attention: dict[tuple[int, int, int], tuple[int, int]]  # with the worker


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
        self._packs: list[worker_messages.Packed] = []
        self._uploads: list[worker_messages.Uploaded] = []
        self._abandoned = 0
        self._pass_id = 0
        self._pass = _Pass({}, {})
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

    def run(self) -> tuple[worker_messages.ModelOpened, Measured, Setup, Times]:
        """Raises WorkerDied, or PlanError where the budget does not hold what is to be measured."""
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
        processes = Measured(opened.resident_bytes, resident_bytes()[0], max(self._warm.values()))
        setup = self._set_up(opened, processes)
        for name, num_bytes in setup.arena_bytes.items():
            self._arenas[name].resize(num_bytes)
        self._workers.loader.send(setup.for_loader(self._config.load_format, False))
        for worker in attention:
            worker.send(setup.for_attention(worker.index))
        self._workers.compute.send(setup.for_compute())
        self._until(lambda: not self._workers.not_ready)
        return opened, processes, setup, _Measuring(self, setup).run()

    def _set_up(self, opened: worker_messages.ModelOpened, processes: Measured) -> Setup:
        """A plan with slots for some layers, as many as the budget allows of those that are wanted."""
        spec = opened.spec
        layer_bytes = max(unit.num_bytes for unit in spec.units[:-1])
        layers = spec.columns[columns_to_measure(spec, MOST_COLUMNS) - 1] + 1
        slots = min(spec.num_layers, max(2, layers, -(-WEIGHTS_BYTES // layer_bytes)) + 1)
        fewer = {"micro_batches": self._config.micro_batches or 2}
        while True:
            config = self._config.model_copy(update=fewer | {"layer_slots": slots if slots < spec.num_layers else None})
            try:
                setup = set_up(opened, config, self._machine, None, processes)
            except PlanError:
                if slots <= min(2, spec.num_layers):
                    raise
            else:
                if len(setup.plan.slot_offsets) - 1 >= slots:
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
                self._packs.append(message)
            case worker_messages.Uploaded():
                self._uploads.append(message)
            case worker_messages.Abandoned():
                self._abandoned += 1
            case worker_messages.ComputeReport() if message.pass_id == self._pass_id:
                for done in message.done:
                    if not done.left_only:
                        self._pass.segments[done.column, done.micro_batch] = done.start_ns, done.end_ns
            case worker_messages.AttentionReport() if message.pass_id == self._pass_id:
                for part in message.done:
                    self._pass.attention[part.column, part.micro_batch, worker.index] = part.start_ns, part.end_ns

    def _lost(self, worker: WorkerProcess, error: WorkerDied) -> None:
        raise error

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

    def pack(self, unit: int, slot: int, in_order: bool) -> float:
        count = len(self._packs)
        self._workers.compute.send(worker_messages.Pack(unit, slot, False, in_order))
        self._until(lambda: len(self._packs) > count)
        return (self._packs[-1].end_ns - self._packs[-1].start_ns) / 1e9

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
        self, batches: Sequence[MicroBatch], slots: Sequence[int], threads: int, num_columns: int, stops: frozenset[int]
    ) -> tuple[_Pass, int]:
        """The segments whose layers' weights are in `slots`, and the attention behind each but the model's last; with
        when it was ordered."""
        self._pass_id += 1
        self._pass = _Pass({}, {})
        ordered = time.monotonic_ns()
        token_batches = tuple(batch.token_batch(k) for k, batch in enumerate(batches))
        self._workers.compute.send(
            worker_messages.BeginCompute(self._pass_id, threads, token_batches), expects_answer=False
        )
        attention = [worker for worker in self._workers if worker.kind == "attention"]
        for worker in attention:
            spans = tuple(b.kv_batch(k, worker.index) for k, b in enumerate(batches) if worker.index in b.workers())
            worker.send(
                worker_messages.BeginAttention(self._pass_id, self._attention_threads, spans), expects_answer=False
            )
        self._workers.compute.send(
            worker_messages.Segments(self._pass_id, 0, tuple(slots)), expects_answer=False
        )
        attended = [column for column in range(min(len(slots), num_columns)) if column not in stops]
        parts = sum(len(batch.workers()) for batch in batches) * len(attended)
        found = self._pass
        self._until(lambda: len(found.segments) == len(slots) * len(batches) and len(found.attention) == parts)
        if len(slots) <= num_columns:
            self._abandoned = 0
            self._workers.compute.send(worker_messages.Abandon())
            for worker in attention:
                worker.send(worker_messages.Abandon())
            self._until(lambda: self._abandoned == 1 + len(attention))
        return found, ordered

    _attention_threads = 1


class _Measuring:
    """What is measured, one after the other."""

    def __init__(self, owner: Calibrator, setup: Setup) -> None:
        self._owner, self._setup = owner, setup
        self._spec: ModelSpec = setup.spec
        self._plan = setup.plan
        owner._attention_threads = setup.plan.attention_threads
        self._kinds = layer_kinds(self._spec)
        self._num_slots = len(self._plan.slot_offsets) - 1
        self._until = time.monotonic() + SECONDS
        self._tables = PageTable(self._plan.num_pages, self._plan.kv_groups, self._plan.attention_workers)

    def run(self) -> Times:
        owner, plan = self._owner, self._plan
        owner.give_time(600)
        loads = self._load()
        uploads = self._upload() if plan.staged else {}
        kinds = ("raw",) if plan.staged else ("raw", "packed")
        passes: list[PassTimes] = []
        packs: dict[int, float] = {}
        self._until = time.monotonic() + SECONDS
        for number, order in enumerate(kinds):
            if order == "packed":
                packs = self._pack()
            budget = (self._until - time.monotonic()) / (len(kinds) - number)
            passes += self._passes(order, time.monotonic() + budget)
        beside, alone = self._beside_loads(passes)
        return Times(tuple(passes), tuple(beside), loads, tuple(alone), packs, uploads)

    # ------------------------------------------------------------------------------------------------ weights

    def _slot(self, layer: int) -> int:
        """Where weights of its kind are."""
        if layer < self._num_slots - 1:
            return layer
        same = [other for other in range(self._num_slots - 1) if self._kinds[other] == self._kinds[layer]]
        return same[layer % len(same)] if same else 0

    def _load(self) -> dict[int, LoadTimes]:
        """The first time memory is taken; the second time it is there."""
        owner, spec = self._owner, self._spec
        found: dict[int, list[list[float]]] = {}
        units = [(layer, layer, self._kinds[layer]) for layer in range(min(self._num_slots, spec.num_layers))]
        units.append((spec.num_layers, len(self._plan.slot_offsets) - 1, -1))
        for unit, slot, kind in units:
            found.setdefault(kind, [[], []])[0].append(owner.load(unit, slot))
        for unit, slot, kind in units[:-1]:
            if len(found[kind][1]) < LOADED_AGAIN:
                found[kind][1].append(owner.load(unit, slot))
        return {kind: LoadTimes(tuple(first), tuple(again or first)) for kind, (first, again) in found.items()}

    def _upload(self) -> dict[int, float]:
        owner, plan, spec = self._owner, self._plan, self._spec
        owner.upload(spec.num_layers, len(plan.slot_offsets) - 1, plan.device_slots)
        found: dict[int, float] = {}
        for layer in range(min(plan.device_slots, self._num_slots)):
            for _ in range(2):
                found[self._kinds[layer]] = owner.upload(layer, self._slot(layer), layer)
        return found

    def _pack(self) -> dict[int, float]:
        """All layers: those that have no slot of their own lie in the order that another's are put in."""
        found: dict[int, float] = {}
        done: set[int] = set()
        owner, spec = self._owner, self._spec
        for layer in range(spec.num_layers):
            slot = self._slot(layer)
            seconds = owner.pack(layer, slot, slot in done)
            if slot not in done:
                found[self._kinds[layer]] = seconds
            done.add(slot)
        owner.pack(spec.num_layers, len(self._plan.slot_offsets) - 1, False)
        return found

    # ------------------------------------------------------------------------------------------------ passes

    def _passes(self, order: str, until: float) -> list[PassTimes]:
        most, sequences = self._setup.exchange.max_tokens, self._plan.max_sequences
        whole = order == "packed" or self._plan.staged
        shapes = [PassShape(order, (n,), SHORT_CONTEXT, ()) for n in SINGLES if n <= min(most, sequences)]
        singles = len(shapes)
        for rows in PROMPT_ROWS:
            if rows <= most:
                short = min(rows, SHORT_PROMPT)
                shapes.append(PassShape(order, (0,), 0, ((short,) * (rows // short),)))
        if most > SHORT_PROMPT:
            rows = min(most, 1024)
            shapes.append(PassShape(order, (0,), 0, ((rows,),)))
        found = []
        for number, shape in enumerate(shapes):
            if time.monotonic() > until and number not in (0, len(shapes) - 1):
                continue
            columns = None
            if whole and number < singles and shape.singles[0] in (1, 16, 64, 256):
                columns = len(self._spec.columns) + 1
            one = self.measure(shape, columns)
            found.append(one)
        if whole:
            context = self._longest_context(64)
            count = min(64, sequences)
            if context > 2 * SHORT_CONTEXT:
                found.append(self.measure(PassShape(order, (count,), context, ()), None))
            if self._plan.micro_batches > 1 and count > 1:
                both = (count // 2, count // 2)
                found.append(self.measure(PassShape(order, both, max(context, SHORT_CONTEXT), ((), ())), None))
        return found

    def _longest_context(self, count: int) -> int:
        table = self._tables
        context = min(LONG_CONTEXT, self._spec.max_length - 2)
        while context > SHORT_CONTEXT:
            if table.pages_for(context + 1, context + 1) * -(-count // table.num_workers) <= table.size(0):
                return context
            context //= 2
        return context

    def _columns(self, rows: int) -> int:
        most = columns_to_measure(self._spec, MOST_COLUMNS)
        if rows > MANY_ROWS:
            return min(len(self._spec.columns), max(most, FEW_COLUMNS))
        layers = self._num_slots - 1
        with_slots = sum(1 for layer in self._spec.columns if layer < max(1, layers))
        return max(most, min(len(self._spec.columns), with_slots))

    def measure(self, shape: PassShape, columns: int | None, times: int = 2) -> PassTimes:
        """The last of some runs: the first one finds caches empty and programs not made."""
        batches = self._batches(shape)
        rows = sum(batch.num_rows for batch in batches)
        columns = columns or self._columns(rows)
        spec, plan = self._spec, self._plan
        slots = [self._device_or_slot(spec.columns[c]) if c < len(spec.columns) else -1 for c in range(columns)]
        stops = frozenset(spec.stops)
        found, ordered = self._owner.run_pass(batches, slots, plan.compute_threads, len(spec.columns), stops)
        length = max(end for _, end in found.segments.values()) - ordered
        if length < LONGEST_PASS * 1e9:
            for _ in range(times - 1):
                found, ordered = self._owner.run_pass(batches, slots, plan.compute_threads, len(spec.columns), stops)
        return _times_of(shape, found, ordered, columns, len(batches))

    def _device_or_slot(self, layer: int) -> int:
        return layer % self._plan.device_slots if self._plan.staged else self._slot(layer)

    def _batches(self, shape: PassShape) -> list[MicroBatch]:
        table = PageTable(self._plan.num_pages, self._plan.kv_groups, self._plan.attention_workers)
        batches, number = [], 0
        prompts = shape.prompts or ((),) * len(shape.singles)
        for singles, lengths in zip(shape.singles, prompts, strict=True):
            batch = MicroBatch()
            for length, stored in [(shape.context + 1, shape.context)] * singles + [(n, 0) for n in lengths]:
                request = RunningRequest(
                    number, [(7 * i + 3) % self._spec.vocab_size for i in range(length)], length, PARAMS, 0, frozenset(),
                    worker=number % table.num_workers,
                )  # fmt: skip
                pages = table.allocate(number, request.worker, length, length)
                assert pages is not None, f"no pages for {length} tokens"
                request.stored = stored
                request.pages = (table.grow(number, stored, length) if stored else pages) or pages
                if self._spec.states:
                    request.state = number % self._plan.max_sequences
                batch.add(Piece(request, length - stored))
                number += 1
            batches.append(batch)
        return batches

    def _beside_loads(self, passes: Sequence[PassTimes]) -> tuple[list[PassTimes], list[float]]:
        """Passes as before while the loader reads, and seconds of each load."""
        order = passes[-1].shape.order
        few = [one for one in passes if one.shape.order == order and sum(one.shape.singles) in (16, 64)]
        many = [one for one in passes if one.shape.order == order and 256 <= sum(map(sum, one.shape.prompts)) <= 1024]
        spare = self._num_slots - 1
        beside, loads = [], []
        for one in (*few[:1], *few[-1:], *many[:1]):
            stop = self._owner.load_on_and_on(min(spare, self._spec.num_layers - 1), spare)
            beside.append(replace(self.measure(one.shape, len(one.segments), times=3), shape=one.shape))
            loads += stop()
        return beside, loads


def _times_of(shape: PassShape, found: _Pass, ordered: int, columns: int, count: int) -> PassTimes:
    segments = tuple(
        tuple((found.segments[c, k][1] - found.segments[c, k][0]) / 1e9 for k in range(count)) for c in range(columns)
    )
    spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (column, k, _), span in found.attention.items():
        spans.setdefault((column, k), []).append(span)
    attention = tuple(
        tuple(max((end - start for start, end in spans.get((c, k), ())), default=0) / 1e9 for k in range(count))
        for c in range(columns)
    )
    hops = []
    if count == 1:
        for column in range(columns - 1):
            if (column, 0) in spans:
                waited = found.segments[column + 1, 0][0] - found.segments[column, 0][1]
                hops.append(waited / 1e9 - attention[column][0])
    first = min(start for start, _ in found.segments.values())
    last = max(end for _, end in found.segments.values())
    hop = sorted(hops)[len(hops) // 2] if hops else 0.0
    return PassTimes(shape, segments, attention, max(0.0, hop), (first - ordered) / 1e9, (last - first) / 1e9)

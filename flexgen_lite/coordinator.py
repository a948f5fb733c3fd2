"""The coordinator process: owns the queue, the schedule, the KV page table and the arenas; starts and watches the
workers; serves clients. No tensor math, no CUDA, no blocking file reads.

Started by EngineProcess: one JSON line on standard input (`config`, `run_dir`, `expected`), then the pipe is held open
and its end is this process's end. Events go to standard output, one JSON object a line: log, plan, ready, failed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from flexgen_lite import messages, plan
from flexgen_lite.arena import Arena
from flexgen_lite.batching import Batcher, MicroBatch
from flexgen_lite.client_door import ClientDoor
from flexgen_lite.config import ConfigError, EngineConfig
from flexgen_lite.crew import Crew, overdue
from flexgen_lite.event_loop import EventLoop
from flexgen_lite.expected_work import ExpectedWork
from flexgen_lite.kv_layout import kv_spec
from flexgen_lite.lanes import Lanes
from flexgen_lite.machine import inspect_machine
from flexgen_lite.memory_use import MemoryUse
from flexgen_lite.model_spec import ModelSpec
from flexgen_lite.page_table import PageTable
from flexgen_lite.requests import Answer, Limits, Requests
from flexgen_lite.schedule import RunColumns, Schedule
from flexgen_lite.slot_ring import SlotRing
from flexgen_lite.suspects import TRIES, Suspects
from flexgen_lite.tokenizer import TextTokenizer
from flexgen_lite.weight_flow import WeightFlow
from flexgen_lite.worker_process import WorkerDied, WorkerProcess

WINDOW = 4096  # requests that a client may have submitted and not got back
GATHER_PAUSE = 0.02  # seconds without a new request after which an idle engine begins
GATHER_SECONDS = 0.5  # at most, since the first request


class Stopping(Exception):
    """The coordinator was told to stop."""


def emit(event: str, **values: object) -> None:
    """One event for the process that started this one."""
    with contextlib.suppress(BrokenPipeError, OSError):
        sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
        sys.stdout.flush()


def log(text: str) -> None:
    emit("log", message=text)


class Coordinator:
    """`with Coordinator(config, run_dir, expected) as coordinator: coordinator.run()`; no process is left behind."""

    def __init__(self, config: EngineConfig, run_dir: Path, expected: ExpectedWork | None) -> None:
        self._config = config
        self._run_dir = run_dir
        self._expected = expected
        self._machine = inspect_machine()
        try:
            self._lanes = Lanes(config.trace)
        except OSError as error:
            raise plan.PlanError(f"trace={config.trace} cannot be written: {error.strerror}") from error
        self._arenas = {name: Arena(name) for name in ("weights", "kv", "exchange")}
        self._memory = MemoryUse(self._arenas.values())
        self._loop = EventLoop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._crew = Crew(
            self._loop,
            self._context,
            run_dir,
            self._arenas,
            self._memory,
            self._handle,
            lambda name, line: log(f"{name}: {line}"),
            self._lost,
        )
        self._door = ClientDoor(
            self._loop,
            self._context,
            self._handle_client,
            lambda text: log(f"a client sent what is not a message: {text}"),
            lambda client: self._queue.forget(client),
        )
        self._opened: messages.ModelOpened | None = None
        self._plan: plan.Plan | None = None
        self._schedule: Schedule | None = None
        self._weights: WeightFlow | None = None
        self._requests: Requests | None = None
        self._begin_at: float | None = None  # when to start the first pass of an idle engine
        self._gathering_since = 0.0
        self._pass_id = 0
        self._pass: list[MicroBatch] = []
        self._pass_tokens: list[tuple[int, ...]] = []
        self._pass_start_ns = 0
        self._progress = 0.0  # when something of the pass was last heard of, monotonic seconds
        self._suspended = False  # a worker was lost: nothing begins until all is quiet and everyone is there again
        self._broken: WorkerDied | None = None  # what ended the present pass without a result
        self._abandoning = False  # the compute worker was told to drop the pass, and has not answered
        self._suspects = Suspects()
        self._copy_ns = 0
        self._busy_ns = 0
        self._lane_history: list[tuple[int, dict[str, int]]] = []
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write)
        self._loop.watch(self._wake_read, self._stop)
        self._loop.watch(sys.stdin.fileno(), self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._requests is not None:
            text = "the engine was stopped" if error is None or isinstance(error, Stopping) else str(error)
            self._door.tell_the_end(self._requests.clients(), text)
        self._crew.stop()
        self._lanes.close()
        self._door.close()
        self._context.destroy(linger=500)
        for arena in self._arenas.values():
            arena.close()

    def run(self) -> None:
        """Start everything and serve until told to stop. Raises WorkerDied, PlanError or Stopping."""
        self._crew.start(plan.num_attention_workers(self._config, self._machine))
        self._bring_up(self._crew.compute)
        deadline = time.monotonic() + self._config.start_timeout
        while self._weights is None or self._crew.not_ready or not self._weights.is_quiet:
            if time.monotonic() > deadline:
                raise WorkerDied(
                    f"not ready after {self._config.start_timeout:g} s: {self._standing()}; "
                    "raise start_timeout if it was only slow"
                )
            self._step(deadline)
        endpoint = self._config.endpoint or f"ipc://{self._run_dir}/engine.sock"
        self._door.open(endpoint)
        emit("ready", endpoint=endpoint)
        while True:
            self._step(None)

    def _step(self, deadline: float | None) -> None:
        """One round of the event loop; before the engine is ready, `deadline` is all there is of deadlines."""
        limit = deadline
        if deadline is None:
            limit = min((since for _, since in self._awaited()), default=None)
            limit = None if limit is None else limit + self._config.worker_timeout
        limits = [moment for moment in (limit, self._begin_at) if moment is not None]
        self._loop.step(max(0, int((min(limits) - time.monotonic()) * 1000) + 1) if limits else None)
        if self._begin_at is not None and time.monotonic() >= self._begin_at:
            self._begin_at = None
            self._begin_pass()
        if deadline is None:
            for worker in overdue(self._awaited(), self._config.worker_timeout):
                self._crew.lose(worker, self._silence(worker))

    def _stop(self) -> None:
        raise Stopping

    def _awaited(self) -> list[tuple[WorkerProcess, float]]:
        """The workers that owe an answer, and since when."""
        owing = []
        for worker in self._crew:
            if not self._crew.is_ready(worker):  # importing and opening take what they take
                grace = self._config.start_timeout - self._config.worker_timeout
                owing.append((worker, worker.started + max(0.0, grace)))
            elif worker.outstanding:
                owing.append((worker, worker.waiting_since))
        if self._pass and not self._suspended:
            compute, attention = self._scheduler.waits_for()
            owing += [(self._crew.compute, self._progress)] * compute
            owing += [(self._crew.attention(index), self._progress) for index in sorted(attention)]
        return owing

    def _silence(self, worker: WorkerProcess) -> WorkerDied:
        return WorkerDied(
            f"{worker.name} (process {worker.pid}) has not answered for {self._config.worker_timeout:g} s: "
            f"{self._standing()}; raise worker_timeout if it was only slow"
        )

    def _standing(self) -> str:
        if self._schedule is None or self._crew.not_ready:
            return f"waiting for {', '.join(sorted(self._crew.not_ready)) or 'the model'}"
        if not self._pass:
            return "loads of weights are open"
        return f"pass {self._pass_id}, {self._schedule.standing()}"

    # ------------------------------------------------------------------------------------------------ start

    def _bring_up(self, worker: WorkerProcess) -> None:
        """Gives a new worker process what it needs, as far as it is known; the rest when it is."""
        if worker.kind == "compute":
            known = self._opened.spec.dtype if self._opened else None
            worker.send(
                messages.OpenModel(
                    model=self._config.model,
                    load_format=self._config.load_format,
                    dtype=known or self._config.dtype,  # "auto" is measured: it could come out otherwise
                    device=self._config.device,
                    always_probe=False,
                    max_model_len=self._config.max_model_len,
                )
            )
        elif self._plan is not None:
            self._attach(worker)

    def _model_opened(self, message: messages.ModelOpened) -> None:
        if self._opened is None:
            self._make_plan(message)
            return
        if (message.spec, message.fingerprint) != (self._opened.spec, self._opened.fingerprint):
            raise plan.PlanError(f"{self._config.model} changed while it was in use: start again")
        self._attach(self._crew.compute)

    def _make_plan(self, message: messages.ModelOpened) -> None:
        spec = message.spec
        made = plan.make_plan(
            self._config,
            spec,
            self._machine,
            message.resident_bytes,
            message.device_total_bytes > 0,
            message.device_total_bytes,
            self._expected,
        )
        self._opened, self._plan = message, made
        emit("plan", text=plan.describe(made, spec))
        for warning in (*spec.warnings, *made.warnings):
            log(f"warning: {warning}")
        self._kv = kv_spec(spec.attention, made.num_pages, made.page_tokens, spec.dtype)
        self._exchange = messages.ExchangeSpec(
            made.micro_batches, made.region_bytes, made.micro_batch_tokens, spec.dtype
        )
        self._arenas["weights"].resize(made.weights_bytes)
        self._arenas["kv"].resize(self._kv.arena_bytes)
        self._arenas["exchange"].resize(self._exchange.num_regions * self._exchange.region_bytes)
        self._schedule = _make_schedule(spec, made)
        streamed = made.streamed_layers(spec.num_layers)
        packed = frozenset() if made.staged else frozenset(range(spec.num_layers + 1)) - frozenset(streamed)
        self._weights = WeightFlow(self._crew, self._schedule, packed, made.copy_head, self._compute_columns)
        self._requests = _make_requests(message, made)
        for worker in self._crew:
            self._attach(worker)
        self._weights.carry_out(self._schedule.start())

    def _attach(self, worker: WorkerProcess) -> None:
        assert self._opened is not None and self._plan is not None and self._weights is not None
        made, spec = self._plan, self._opened.spec
        if worker.kind == "loader":
            worker.send(
                messages.AttachLoader(
                    spec.files,
                    spec.units,
                    made.slot_offsets,
                    made.weights_bytes,
                    self._config.load_format,
                    made.loader_threads,
                    made.loader_cpus,
                )
            )
            self._weights.loader_attached()
        elif worker.kind == "attention":
            cpus = made.attention_cpus[_number(worker)]
            worker.send(
                messages.AttachAttention(spec.attention, self._exchange, self._kv, made.attention_threads, cpus)
            )
        else:
            worker.send(
                messages.AttachCompute(
                    made.slot_offsets,
                    made.weights_bytes,
                    self._exchange,
                    made.device_slots,
                    made.layer_slot_bytes,
                    bool(made.device_slots or made.layer_slots),
                    made.compute_threads,
                    made.compute_cpus,
                )
            )
            self._weights.compute_attached()

    # ------------------------------------------------------------------------------------------------ workers

    @property
    def _scheduler(self) -> Schedule:
        assert self._schedule is not None, "work before the model was opened"
        return self._schedule

    @property
    def _flow(self) -> WeightFlow:
        assert self._weights is not None, "work before the model was opened"
        return self._weights

    @property
    def _queue(self) -> Requests:
        assert self._requests is not None, "work before the model was opened"
        return self._requests

    def _handle(self, worker: WorkerProcess, message: Any) -> None:
        match message:
            case messages.ComputeReport():
                self._computed(message)
            case messages.AttentionReport():
                self._attended(worker, message)
            case messages.Loaded():
                self._lanes.add("disk", "disk", f"load {message.unit}", message.start_ns, message.end_ns)
                self._crew.did_something(worker)
                self._flow.loaded(message)
            case messages.Packed():
                self._lanes.span("compute", f"pack {message.unit}", message.start_ns, message.end_ns)
                self._flow.was_packed(message)
            case messages.Uploaded():
                name = f"upload {message.unit}"
                self._lanes.add("host-to-device", "host-to-device", name, message.start_ns, message.end_ns)
                self._flow.uploaded(message)
            case messages.ModelOpened():
                self._model_opened(message)
            case messages.Ready():
                self._crew.ready(worker)
            case messages.Abandoned():
                self._abandoning = False
        self._go_on()

    def _computed(self, report: messages.ComputeReport) -> None:
        if report.pass_id != self._pass_id or self._suspended:
            return
        self._progress = time.monotonic()
        for done in report.done:
            name = f"{'before ' * done.left_only}layer {done.layer} micro-batch {done.micro_batch}"
            self._lanes.add("compute", "compute", name, done.start_ns, done.end_ns)
            self._copy_ns += done.copy_ns
            if done.left_only:
                self._flow.carry_out(self._scheduler.layer_left(done.layer, done.micro_batch))
                continue
            if done.layer == self._scheduler.num_layers:
                self._pass_tokens[done.micro_batch] = done.token_ids
            self._flow.carry_out(self._scheduler.segment_done(done.layer, done.micro_batch))
        if self._scheduler.pass_done:
            self._end_pass()

    def _attended(self, worker: WorkerProcess, report: messages.AttentionReport) -> None:
        self._progress = time.monotonic()
        for done in report.done:
            name = f"layer {done.layer} micro-batch {done.micro_batch}"
            self._lanes.add("attention", worker.name, name, done.start_ns, done.end_ns)
            if report.pass_id == self._pass_id and self._pass and not self._suspended:
                self._scheduler.attended(done.layer, done.micro_batch, _number(worker))

    def _compute_columns(self, order: RunColumns) -> None:
        self._progress = time.monotonic()
        self._crew.compute.send(messages.Segments(self._pass_id, order.layer, order.slots), expects_answer=False)

    # ------------------------------------------------------------------------------------------------ losses

    def _lost(self, worker: WorkerProcess, error: WorkerDied) -> None:
        """A worker's process is gone: another takes its place. Without the compute worker or an attention worker the
        pass ends without a result; what was stored before it is still there."""
        broken = bool(self._pass) and worker.kind != "loader" and not self._suspended
        log(f"{error}; starting it again{'; the pass is repeated' if broken else ''}")
        if self._weights is not None and self._schedule is not None:
            if worker.kind == "loader":
                self._weights.loader_lost()
            elif worker.kind == "compute":
                self._weights.compute_lost()
                self._abandoning = False
            if broken or worker.kind == "compute":
                self._schedule.suspend()
                self._suspended = True
        if broken:
            self._crew.did_something(worker)  # how often a pass may fail is a matter of its own
            if worker.kind == "attention":
                self._crew.compute.send(messages.Abandon())
                self._abandoning = True
            self._broken = error
        self._bring_up(self._crew.start_again(worker))

    def _go_on(self) -> None:
        """Back to work once everyone is there and nothing is on its way."""
        if self._weights is None or self._crew.not_ready:
            return
        if self._suspended:
            if self._abandoning or not self._weights.is_quiet:
                return
            self._suspended = False
            self._weights.carry_out(self._scheduler.abandon_pass())
        if self._broken is not None:
            error, self._broken = self._broken, None
            self._retry(error)
        elif not self._pass and self._begin_at is None:
            self._begin_pass()

    def _retry(self, error: WorkerDied) -> None:
        """The pass again, or one with less in it."""
        ids = [piece.request.id for micro_batch in self._pass for piece in micro_batch.pieces]
        as_it_is, guilty = self._suspects.failed(ids)
        if as_it_is:
            self._start_pass()
            return
        self._pass = []
        if guilty is not None:
            text = f"{TRIES} times in a row a worker was lost while it computed this request alone, at last: {error}"
            self._answer(self._queue.fail(guilty, text))
            log(f"a request is given up: {text}")
        self._begin_pass()

    # ------------------------------------------------------------------------------------------------ passes

    def _begin_soon(self) -> None:
        """Begin when no more requests come in: a pass costs a load of the weights whatever rides on it."""
        if not self._pass:
            now = time.monotonic()
            self._gathering_since = now if self._begin_at is None else self._gathering_since
            self._begin_at = min(now + GATHER_PAUSE, self._gathering_since + GATHER_SECONDS)

    def _begin_pass(self) -> None:
        """Compose and start the next pass, if there is work, nothing running, and nobody missing."""
        if self._pass or self._suspended or self._crew.not_ready:
            return
        self._begin_at = None
        self._pass = self._queue.next_pass(self._suspects.group)
        while not self._pass and self._suspects.group is not None:  # they were cancelled
            self._suspects.skip()
            self._pass = self._queue.next_pass(self._suspects.group)
        if self._pass:
            self._pass_start_ns = time.monotonic_ns()
            self._start_pass()

    def _start_pass(self) -> None:
        """The composed pass, under a number of its own."""
        assert self._plan is not None
        self._pass_id += 1
        self._progress = time.monotonic()
        self._pass_tokens = [()] * len(self._pass)
        token_batches = tuple(m.token_batch(k) for k, m in enumerate(self._pass))
        self._crew.compute.send(
            messages.BeginCompute(self._pass_id, self._plan.compute_threads, token_batches), expects_answer=False
        )
        for index in range(self._plan.attention_workers):
            batches = tuple(m.kv_batch(k, index) for k, m in enumerate(self._pass) if index in m.workers())
            self._crew.attention(index).send(
                messages.BeginAttention(self._pass_id, self._plan.attention_threads, batches), expects_answer=False
            )
        self._flow.carry_out(self._scheduler.begin_pass([m.workers() for m in self._pass]))

    def _end_pass(self) -> None:
        now = time.monotonic_ns()
        self._busy_ns += now - self._pass_start_ns
        self._lanes.end_pass(f"pass {self._pass_id}", self._pass_start_ns, now)
        done, self._pass = self._pass, []
        self._suspects.passed()
        for worker in self._crew:
            self._crew.did_something(worker)
        answers = self._queue.end_pass(done, self._pass_tokens)
        self._queue.totals["passes"] += 1
        self._begin_pass()  # first, so that the workers are busy while the answers go out
        self._answer(answers)
        self._memory.sample()
        self._remember_lanes(now)

    def _remember_lanes(self, now: int) -> None:
        self._lane_history.append((now, self._lanes.busy_ns))
        while len(self._lane_history) > 2 and now - self._lane_history[1][0] > 5e9:
            self._lane_history.pop(0)

    # ------------------------------------------------------------------------------------------------ clients

    def _handle_client(self, client: bytes, message: Any) -> None:
        match message:
            case messages.Connect():
                self._door.send(client, self._welcome())
            case messages.Submit():
                self._answer(self._queue.submit(client, message))
                self._begin_soon()
            case messages.Cancel():
                self._answer(self._queue.cancel(client, message.job_id))
            case messages.GetStatus():
                self._door.send(client, self._status())

    def _answer(self, answers: Iterable[Answer]) -> None:
        for client, message in answers:
            self._door.send(client, message)

    def _welcome(self) -> messages.Welcome:
        assert self._opened is not None and self._plan is not None
        opened, text = self._opened, plan.describe(self._plan, self._opened.spec)
        return messages.Welcome(
            messages.PROTOCOL, self._config.model, opened.fingerprint, opened.spec.max_length, WINDOW, text
        )

    def _status(self) -> messages.Status:
        assert self._plan is not None
        now = time.monotonic_ns()
        since, busy = self._lane_history[0] if self._lane_history else (now, self._lanes.busy_ns)
        lanes = {
            lane: min(1.0, (total - busy.get(lane, 0)) / max(1, now - since))
            for lane, total in self._lanes.busy_ns.items()
        }
        running_ns = now - self._pass_start_ns if self._pass else 0
        totals = {key: float(value) for key, value in self._queue.totals.items()}
        totals["restarts"] = float(self._crew.restarts)
        totals["busy_seconds"] = (self._busy_ns + running_ns) / 1e9
        totals["overhead_seconds"] = (self._lanes.overhead_ns + self._copy_ns) / 1e9
        for lane, total in self._lanes.busy_ns.items():
            totals[f"{lane}_seconds"] = total / 1e9
        used = self._memory.sample()
        return messages.Status(
            running=self._queue.num_running,
            waiting=self._queue.num_waiting,
            done=self._queue.totals["requests_done"],
            lanes=lanes,
            totals=totals,
            memory={"budget": self._plan.ram, "used": used, "peak": self._memory.peak},
        )


def _number(attention_worker: WorkerProcess) -> int:
    return int(attention_worker.name.rpartition(" ")[2])


def _make_requests(opened: messages.ModelOpened, made: plan.Plan) -> Requests:
    spec = opened.spec
    pages = PageTable(made.num_pages, made.page_tokens, made.attention_workers)
    batcher = Batcher(pages, made.max_sequences, made.micro_batches, made.micro_batch_tokens, made.spread)
    eos = tuple(token for token in spec.eos_token_ids if 0 <= token < spec.vocab_size)
    limits = Limits(spec.max_length, pages.max_tokens, spec.vocab_size, eos)
    return Requests(batcher, limits, TextTokenizer(opened.tokenizer_file) if opened.tokenizer_file else None)


def _make_schedule(spec: ModelSpec, made: plan.Plan) -> Schedule:
    """Slot numbers: resident layers in order, then the ring, then everything outside the layers."""
    last = len(made.slot_offsets) - 1
    pinned = {spec.num_layers: last} | {layer: slot for slot, layer in enumerate(made.resident_layers)}
    ring = range(len(made.resident_layers), last)
    host = SlotRing(pinned, made.streamed_layers(spec.num_layers), tuple(ring))
    if not made.staged:
        return Schedule(spec.num_layers, host)
    device = SlotRing({spec.num_layers: made.device_slots}, range(spec.num_layers), range(made.device_slots))
    return Schedule(spec.num_layers, host, device)


def main() -> int:
    order = json.loads(_first_line(sys.stdin.fileno()))
    run_dir = Path(order["run_dir"])
    try:
        config = EngineConfig.from_json(json.dumps(order["config"]))
        expected = ExpectedWork.from_dict(order.get("expected"))
        with Coordinator(config, run_dir, expected) as coordinator:
            coordinator.run()
    except Stopping:
        return 0
    except (ConfigError, plan.PlanError) as error:
        emit("failed", message=str(error), user_error=True, details="")
        return 2
    except WorkerDied as error:
        emit("failed", message=str(error), user_error=error.user_error, details=error.details)
        return 2 if error.user_error else 1
    except Exception as error:  # the one crash boundary: report, then end
        details = "".join(traceback.format_exception(error))
        emit("failed", message=f"the coordinator failed: {error!r}", user_error=False, details=details)
        return 1
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)  # its owner may be gone
    return 0


def _first_line(descriptor: int) -> bytes:
    """Read unbuffered: what comes behind the line is watched for."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            raise EOFError("no order on standard input")
        line += byte
    return line


if __name__ == "__main__":
    raise SystemExit(main())

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
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from flexgen_lite import messages, plan
from flexgen_lite.arena import Arena
from flexgen_lite.batching import Batcher, MicroBatch
from flexgen_lite.bells import bell_pair
from flexgen_lite.codec import Codec, MessageError
from flexgen_lite.config import ConfigError, EngineConfig
from flexgen_lite.expected_work import ExpectedWork
from flexgen_lite.kv_layout import kv_spec
from flexgen_lite.lanes import Lanes
from flexgen_lite.machine import inspect_machine
from flexgen_lite.memory_use import MemoryUse
from flexgen_lite.model_spec import ModelSpec
from flexgen_lite.page_table import PageTable
from flexgen_lite.requests import Answer, Limits, Requests
from flexgen_lite.schedule import LoadUnit, Order, RunColumns, Schedule, UploadUnit
from flexgen_lite.slot_ring import SlotRing
from flexgen_lite.supervisor import WorkerDied, WorkerProcess, stop_all
from flexgen_lite.tokenizer import TextTokenizer

WINDOW = 4096  # requests that a client may have submitted and not got back
GATHER_PAUSE = 0.02  # seconds without a new request after which an idle engine begins
GATHER_SECONDS = 0.5  # at most, since the first request
COMPUTE_ENVIRONMENT = {
    # Temporaries of a layer are reused instead of faulting in fresh pages each time.
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296:"
    "glibc.malloc.top_pad=268435456",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Threads look out for the next operation for some 40 us before they sleep: to be woken takes longer than many of
    # them last. Decoding 64 sequences gains 2 to 8 per cent; more gains nothing.
    "GOMP_SPINCOUNT": "2000",
}
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}


class Stopping(Exception):
    """The coordinator was told to stop."""


def emit(event: str, **values: object) -> None:
    """One event for the process that started this one."""
    with contextlib.suppress(BrokenPipeError, OSError):
        sys.stdout.write(json.dumps({"event": event, **values}) + "\n")
        sys.stdout.flush()


class Coordinator:
    """`with Coordinator(config, run_dir, expected) as coordinator: coordinator.run()`; no process is left behind."""

    def __init__(self, config: EngineConfig, run_dir: Path, expected: ExpectedWork | None) -> None:
        self._config = config
        self._expected = expected
        self._run_dir = run_dir
        self._machine = inspect_machine()
        self._arenas = {name: Arena(name) for name in ("weights", "kv", "exchange")}
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._poller = zmq.Poller()
        self._sources: dict[Any, Callable[[], None]] = {}  # socket or descriptor -> what to do when it is readable
        self._workers: dict[str, WorkerProcess] = {}
        self._bells: list[tuple[socket.socket, socket.socket]] = []  # of each attention worker, with the compute worker
        self._clients: zmq.Socket[bytes] | None = None
        self._endpoint_path: Path | None = None
        self._codecs = (Codec(messages.ToEngine, max_bytes=256 << 20), Codec(messages.ToClient))
        try:
            self._lanes = Lanes(config.trace)
        except OSError as error:
            raise plan.PlanError(f"trace={config.trace} cannot be written: {error.strerror}") from error
        self._memory = MemoryUse(self._arenas.values())
        self._loads_open = 0
        self._streamed: frozenset[int] = frozenset()  # units that do not stay in their slot
        self._not_ready: set[str] = set()
        self._opened: messages.ModelOpened | None = None
        self._plan: plan.Plan | None = None
        self._schedule: Schedule | None = None
        self._requests: Requests | None = None
        self._pass_id = 0
        self._begin_at: float | None = None  # when to start the first pass of an idle engine
        self._gathering_since = 0.0
        self._pass: list[MicroBatch] = []
        self._pass_tokens: list[tuple[int, ...]] = []
        self._pass_start_ns = 0
        self._progress = 0.0  # when something of the pass was last heard of, monotonic seconds
        self._copy_ns = 0
        self._busy_ns = 0
        self._lane_history: list[tuple[int, dict[str, int]]] = []
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write)
        self._watch(self._wake_read, self._stop)
        self._watch(sys.stdin.fileno(), self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._tell_clients(error)
        stop_all(self._workers.values())
        self._lanes.close()
        if self._clients is not None:
            self._clients.close(linger=500)
        if self._endpoint_path is not None:
            self._endpoint_path.unlink(missing_ok=True)
        self._context.destroy(linger=500)
        for arena in self._arenas.values():
            arena.close()
        for pair in self._bells:
            for end in pair:
                end.close()

    def run(self) -> None:
        """Start everything and serve until told to stop. Raises WorkerDied, PlanError or Stopping."""
        self._start_workers()
        deadline = time.monotonic() + self._config.start_timeout
        while self._not_ready or self._loads_open or self._schedule is None:
            if time.monotonic() > deadline:
                raise WorkerDied(
                    f"not ready after {self._config.start_timeout:g} s: {self._standing()}; "
                    "raise start_timeout if it was only slow"
                )
            self._step(deadline)
        self._open_endpoint()
        while True:
            self._step(None)

    def _step(self, deadline: float | None) -> None:
        limit = deadline  # at start, importing and opening take what they take
        if deadline is None:
            limit = min((since for _, since in self._awaited()), default=None)
            limit = None if limit is None else limit + self._config.worker_timeout
        limits = [moment for moment in (limit, self._begin_at) if moment is not None]
        timeout = max(0, int((min(limits) - time.monotonic()) * 1000) + 1) if limits else None
        ready = [source for source, _ in self._poller.poll(timeout)]
        for source in ready:
            if source in self._sources:
                self._sources[source]()
        if self._begin_at is not None and time.monotonic() >= self._begin_at:
            self._begin_pass()
        if deadline is None:
            self._check_deadlines()

    def _stop(self) -> None:
        raise Stopping

    def _awaited(self) -> list[tuple[WorkerProcess, float]]:
        """The workers that owe an answer, and since when."""
        owing = [(worker, worker.waiting_since) for worker in self._workers.values() if worker.outstanding]
        if self._pass:
            compute, attention = self._scheduler.waits_for()
            owing += [(self._compute, self._progress)] * compute
            owing += [(self._attention(index), self._progress) for index in sorted(attention)]
        return owing

    def _check_deadlines(self) -> None:
        for worker, since in self._awaited():
            if time.monotonic() - since > self._config.worker_timeout:
                raise WorkerDied(
                    f"{worker.name} (process {worker.pid}) has not answered for {self._config.worker_timeout:g} s: "
                    f"{self._standing()}; raise worker_timeout if it was only slow"
                )

    def _standing(self) -> str:
        if self._schedule is None or self._not_ready:
            waiting = sorted(self._not_ready) or ["the model"]
            return f"waiting for {', '.join(waiting)}"
        if self._loads_open and not self._pass:
            return f"{self._loads_open} loads of weights are open"
        return f"pass {self._pass_id}, {self._schedule.standing()}"

    def _watch(self, source: Any, callback: Callable[[], None]) -> None:
        self._poller.register(source, zmq.POLLIN)
        self._sources[source] = callback

    # ------------------------------------------------------------------------------------------------ start

    def _start_workers(self) -> None:
        config, count = self._config, plan.num_attention_workers(self._config, self._machine)
        kinds = [("compute", "compute worker"), ("loader", "disk loader")]
        kinds += [("attention", f"attention worker {i}") for i in range(count)]
        self._bells = [bell_pair() for _ in range(count)]
        wanted = {"compute": ("weights", "exchange"), "loader": ("weights",), "attention": ("kv", "exchange")}
        for kind, name in kinds:
            arenas = {arena: self._arenas[arena].fd for arena in wanted[kind]}
            ends = {"compute": {str(i): pair[0] for i, pair in enumerate(self._bells)}}
            ends |= {f"attention worker {i}": {"compute": pair[1]} for i, pair in enumerate(self._bells)}
            bells = {end: sock.fileno() for end, sock in ends.get(kind, ends.get(name, {})).items()}
            environment = WORKER_ENVIRONMENT | (COMPUTE_ENVIRONMENT if kind == "compute" else {})
            worker = WorkerProcess(kind, name, self._context, self._run_dir, arenas, bells, environment)
            self._workers[name] = worker
            self._not_ready.add(name)
            self._memory.watch(worker.pid)
            self._watch(worker.socket, partial(self._receive, worker))
            self._watch(worker.output, partial(self._forward_output, worker))
            self._watch(worker.pidfd, partial(self._died, worker))
        self._compute.send(
            messages.OpenModel(
                model=config.model,
                load_format=config.load_format,
                dtype=config.dtype,
                device=config.device,
                always_probe=False,
                max_model_len=config.max_model_len,
            )
        )

    @property
    def _compute(self) -> WorkerProcess:
        return self._workers["compute worker"]

    @property
    def _loader(self) -> WorkerProcess:
        return self._workers["disk loader"]

    def _attention(self, index: int) -> WorkerProcess:
        return self._workers[f"attention worker {index}"]

    def _model_opened(self, message: messages.ModelOpened) -> None:
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
        self._streamed = frozenset(made.streamed_layers(spec.num_layers))
        emit("plan", text=plan.describe(made, spec))
        for warning in (*spec.warnings, *made.warnings):
            emit("log", message=f"warning: {warning}")
        kv = kv_spec(spec.attention, made.num_pages, made.page_tokens, spec.dtype)
        exchange = messages.ExchangeSpec(made.micro_batches, made.region_bytes, made.micro_batch_tokens, spec.dtype)
        self._arenas["weights"].resize(made.weights_bytes)
        self._arenas["kv"].resize(kv.arena_bytes)
        self._arenas["exchange"].resize(exchange.num_regions * exchange.region_bytes)
        self._attach(spec, made, kv, exchange)
        self._schedule = _make_schedule(spec, made)
        pages = PageTable(made.num_pages, made.page_tokens, made.attention_workers)
        batcher = Batcher(pages, made.max_sequences, made.micro_batches, made.micro_batch_tokens, made.spread)
        eos = tuple(token for token in spec.eos_token_ids if 0 <= token < spec.vocab_size)
        limits = Limits(spec.max_length, pages.max_tokens, spec.vocab_size, eos)
        tokenizer = TextTokenizer(message.tokenizer_file) if message.tokenizer_file else None
        self._requests = Requests(batcher, limits, tokenizer)

    def _attach(self, spec: ModelSpec, made: plan.Plan, kv: messages.KvSpec, exchange: messages.ExchangeSpec) -> None:
        self._loader.send(
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
        for index in range(made.attention_workers):
            self._attention(index).send(
                messages.AttachAttention(
                    spec.attention, exchange, kv, made.attention_threads, made.attention_cpus[index]
                )
            )
        self._compute.send(
            messages.AttachCompute(
                made.slot_offsets,
                made.weights_bytes,
                exchange,
                made.device_slots,
                made.layer_slot_bytes,
                bool(made.device_slots or made.layer_slots),
                made.compute_threads,
                made.compute_cpus,
            )
        )

    def _open_endpoint(self) -> None:
        """From here on clients can connect."""
        endpoint = self._config.endpoint or f"ipc://{self._run_dir}/engine.sock"
        path = Path(endpoint.removeprefix("ipc://"))
        _refuse_taken(path)
        clients = self._context.socket(zmq.ROUTER)
        clients.setsockopt(zmq.ROUTER_MANDATORY, 1)
        clients.setsockopt(zmq.SNDHWM, 0)  # bounded by what clients may have open
        clients.linger = 0
        try:
            clients.bind(endpoint)
        except zmq.ZMQError as error:
            clients.close()
            raise plan.PlanError(f"cannot listen on {endpoint}: {error.strerror}: choose another endpoint") from error
        path.chmod(0o600)
        self._clients, self._endpoint_path = clients, path
        self._watch(clients, self._from_client)
        emit("ready", endpoint=endpoint)

    # ------------------------------------------------------------------------------------------------ workers

    def _receive(self, worker: WorkerProcess) -> None:
        while worker.socket.poll(0):
            self._handle(worker, worker.receive())

    def _handle(self, worker: WorkerProcess, message: Any) -> None:
        match message:
            case messages.ComputeReport():
                self._computed(message)
            case messages.AttentionReport():
                self._attended(worker, message)
            case messages.Loaded():
                self._lanes.add("disk", "disk", f"load {message.unit}", message.start_ns, message.end_ns)
                self._loaded(message)
            case messages.Packed():
                self._lanes.span("compute", f"pack {message.unit}", message.start_ns, message.end_ns)
                self._at_hand(message.unit)
            case messages.Uploaded():
                self._lanes.add(
                    "host-to-device", "host-to-device", f"upload {message.unit}", message.start_ns, message.end_ns
                )
                self._run_orders(self._scheduler.uploaded(message.unit))
            case messages.ModelOpened():
                self._model_opened(message)
            case messages.Ready():
                self._not_ready.discard(worker.name)
                if worker is self._loader:
                    self._run_orders(self._scheduler.start())

    @property
    def _scheduler(self) -> Schedule:
        assert self._schedule is not None, "work before the model was opened"
        return self._schedule

    def _run_orders(self, orders: Iterable[Order]) -> None:
        for order in orders:
            match order:
                case RunColumns():
                    self._progress = time.monotonic()
                    columns = messages.Segments(self._pass_id, order.layer, order.slots)
                    self._compute.send(columns, expects_answer=False)
                case LoadUnit():
                    self._loads_open += 1
                    self._loader.send(messages.Load(order.unit, order.slot))
                case UploadUnit():
                    self._compute.send(messages.Upload(order.unit, order.slot, order.device_slot))

    def _loaded(self, message: messages.Loaded) -> None:
        """What stays where it is gets rearranged once for the CPU that computes with it."""
        assert self._plan is not None
        if not self._plan.staged and message.unit not in self._streamed:
            self._compute.send(messages.Pack(message.unit, message.slot, self._plan.copy_head))
        else:
            self._at_hand(message.unit)

    def _at_hand(self, unit: int) -> None:
        self._loads_open -= 1
        self._run_orders(self._scheduler.loaded(unit))

    def _computed(self, report: messages.ComputeReport) -> None:
        assert report.pass_id == self._pass_id, f"report of pass {report.pass_id} in pass {self._pass_id}"
        self._progress = time.monotonic()
        for done in report.done:
            name = f"{'before ' * done.left_only}layer {done.layer} micro-batch {done.micro_batch}"
            self._lanes.add("compute", "compute", name, done.start_ns, done.end_ns)
            self._copy_ns += done.copy_ns
            if done.left_only:
                self._run_orders(self._scheduler.layer_left(done.layer, done.micro_batch))
                continue
            if done.layer == self._scheduler.num_layers:
                self._pass_tokens[done.micro_batch] = done.token_ids
            self._run_orders(self._scheduler.segment_done(done.layer, done.micro_batch))
        if self._scheduler.pass_done:
            self._end_pass()

    def _attended(self, worker: WorkerProcess, report: messages.AttentionReport) -> None:
        self._progress = time.monotonic()
        index = int(worker.name.rpartition(" ")[2])
        for done in report.done:
            name = f"layer {done.layer} micro-batch {done.micro_batch}"
            self._lanes.add("attention", worker.name, name, done.start_ns, done.end_ns)
            if report.pass_id == self._pass_id and self._pass:
                self._scheduler.attended(done.layer, done.micro_batch, index)

    def _died(self, worker: WorkerProcess) -> None:
        raise worker.death()

    def _forward_output(self, worker: WorkerProcess) -> None:
        data = worker.read_output()
        if not data:  # its end: the pidfd tells the rest
            self._poller.unregister(worker.output)
            del self._sources[worker.output]
            return
        for line in data.decode(errors="replace").splitlines():
            if line.strip():
                emit("log", message=f"{worker.name}: {line}")

    # ------------------------------------------------------------------------------------------------ passes

    def _begin_soon(self) -> None:
        """Begin when no more requests come in: a pass costs a load of the weights whatever rides on it."""
        if not self._pass:
            now = time.monotonic()
            self._gathering_since = now if self._begin_at is None else self._gathering_since
            self._begin_at = min(now + GATHER_PAUSE, self._gathering_since + GATHER_SECONDS)

    def _begin_pass(self) -> None:
        """Compose and start the next pass, if there is work and none is running."""
        assert self._requests is not None and self._plan is not None
        if self._pass:
            return
        self._begin_at = None
        self._pass = self._requests.next_pass()
        if not self._pass:
            return
        self._pass_id += 1
        self._pass_start_ns = time.monotonic_ns()
        self._pass_tokens = [()] * len(self._pass)
        token_batches = tuple(m.token_batch(k) for k, m in enumerate(self._pass))
        self._compute.send(
            messages.BeginCompute(self._pass_id, self._plan.compute_threads, token_batches), expects_answer=False
        )
        for index in range(self._plan.attention_workers):
            batches = tuple(m.kv_batch(k, index) for k, m in enumerate(self._pass) if index in m.workers())
            self._attention(index).send(
                messages.BeginAttention(self._pass_id, self._plan.attention_threads, batches), expects_answer=False
            )
        self._run_orders(self._scheduler.begin_pass([m.workers() for m in self._pass]))

    def _end_pass(self) -> None:
        assert self._requests is not None
        now = time.monotonic_ns()
        self._busy_ns += now - self._pass_start_ns
        self._lanes.end_pass(f"pass {self._pass_id}", self._pass_start_ns, now)
        done, self._pass = self._pass, []
        answers = self._requests.end_pass(done, self._pass_tokens)
        self._requests.totals["passes"] += 1
        self._begin_pass()  # first, so that the workers are busy while the answers go out
        self._answer(answers)
        self._memory.sample()
        self._remember_lanes(now)

    def _remember_lanes(self, now: int) -> None:
        self._lane_history.append((now, self._lanes.busy_ns))
        while len(self._lane_history) > 2 and now - self._lane_history[1][0] > 5e9:
            self._lane_history.pop(0)

    # ------------------------------------------------------------------------------------------------ clients

    def _from_client(self) -> None:
        assert self._clients is not None
        frames = self._clients.recv_multipart()  # one a time: the workers' messages come in between
        if len(frames) != 2:
            return
        try:
            message = self._codecs[0].decode(frames[1])
        except MessageError as error:
            emit("log", message=f"a client sent what is not a message: {error}")
            return
        self._handle_client(frames[0], message)

    def _handle_client(self, client: bytes, message: Any) -> None:
        assert self._requests is not None
        match message:
            case messages.Connect():
                self._send_client(client, self._welcome())
            case messages.Submit():
                self._answer(self._requests.submit(client, message))
                self._begin_soon()
            case messages.Cancel():
                self._answer(self._requests.cancel(client, message.job_id))
            case messages.GetStatus():
                self._send_client(client, self._status())

    def _welcome(self) -> messages.Welcome:
        assert self._opened is not None and self._plan is not None
        opened, text = self._opened, plan.describe(self._plan, self._opened.spec)
        return messages.Welcome(
            messages.PROTOCOL, self._config.model, opened.fingerprint, opened.spec.max_length, WINDOW, text
        )

    def _status(self) -> messages.Status:
        assert self._requests is not None and self._plan is not None
        now = time.monotonic_ns()
        since, busy = self._lane_history[0] if self._lane_history else (now, self._lanes.busy_ns)
        lanes = {
            lane: min(1.0, (total - busy.get(lane, 0)) / max(1, now - since))
            for lane, total in self._lanes.busy_ns.items()
        }
        running_ns = now - self._pass_start_ns if self._pass else 0
        totals = {key: float(value) for key, value in self._requests.totals.items()}
        totals["busy_seconds"] = (self._busy_ns + running_ns) / 1e9
        totals["overhead_seconds"] = (self._lanes.overhead_ns + self._copy_ns) / 1e9
        for lane, total in self._lanes.busy_ns.items():
            totals[f"{lane}_seconds"] = total / 1e9
        used = self._memory.sample()
        return messages.Status(
            running=self._requests.num_running,
            waiting=self._requests.num_waiting,
            done=self._requests.totals["requests_done"],
            lanes=lanes,
            totals=totals,
            memory={"budget": self._plan.ram, "used": used, "peak": self._memory.peak},
        )

    def _answer(self, answers: Iterable[Answer]) -> None:
        for client, message in answers:
            self._send_client(client, message)

    def _send_client(self, client: bytes, message: Any) -> None:
        assert self._clients is not None and self._requests is not None
        try:
            self._clients.send_multipart([client, self._codecs[1].encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError:  # it is gone: nobody waits for its requests
            self._requests.forget(client)

    def _tell_clients(self, error: BaseException | None) -> None:
        if self._clients is None or self._requests is None:
            return
        text = "the engine was stopped" if error is None or isinstance(error, Stopping) else str(error)
        for client in self._requests.clients():
            with contextlib.suppress(zmq.ZMQError):
                frames = [client, self._codecs[1].encode(messages.EngineFailed(text))]
                self._clients.send_multipart(frames, zmq.NOBLOCK)


def _refuse_taken(path: Path) -> None:
    """Binding would replace whatever is at the path; only a socket that nobody listens to may go.

    Raises:
        PlanError: something else is there.
    """
    if not path.exists():
        if not path.parent.is_dir():
            raise plan.PlanError(f"endpoint ipc://{path}: {path.parent} is not a directory: make it first")
        return
    if not path.is_socket():
        raise plan.PlanError(f"endpoint ipc://{path}: there is a file of that name: choose another endpoint")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        else:
            raise plan.PlanError(f"endpoint ipc://{path} is in use by another engine: choose another endpoint")


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

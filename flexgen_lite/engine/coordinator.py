"""The coordinator: owns the queue, the schedule, the KV page table and the arenas; starts and watches the workers;
serves clients. No tensor math, no CUDA, no blocking file reads.

Start, end, messages and clients are here; passes are in passes.py, what follows the loss of a worker in losses.py, and
the order of layers and micro-batches in flexgen_lite/schedule.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zmq

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.comparison import Prediction
from flexgen_lite.engine.event_loop import EventLoop
from flexgen_lite.engine.events import emit, log
from flexgen_lite.engine.frontend import Frontend
from flexgen_lite.engine.kv_setup import KV_DISK_TOTALS, open_park_file, with_kv_on_disk
from flexgen_lite.engine.lanes import Lanes
from flexgen_lite.engine.losses import Losses
from flexgen_lite.engine.passes import Passes
from flexgen_lite.engine.setup import Setup, open_tokenizer, order_to_open, set_up
from flexgen_lite.engine.stats import EngineStats
from flexgen_lite.engine.worker_process import WorkerDied, WorkerProcess
from flexgen_lite.engine.worker_supervisor import SHARED, WorkerSupervisor, overdue
from flexgen_lite.memory.arena import Arena
from flexgen_lite.memory.usage import MemoryUse, give_back_memory, resident_bytes
from flexgen_lite.plan import plan
from flexgen_lite.plan.machine import inspect_machine
from flexgen_lite.plan.need import Measured, num_attention_workers
from flexgen_lite.plan.text import describe
from flexgen_lite.plan.workload import Workload
from flexgen_lite.queue.client_jobs import MAX_OPEN, Answer
from flexgen_lite.queue.requests import Requests
from flexgen_lite.wire import client_messages, worker_messages
from flexgen_lite.wire.access import read_key_file
from flexgen_lite.wire.engine_share import EngineShare
from flexgen_lite.wire.kv_on_disk import KvMoved, PrefixesOpened


@dataclass(frozen=True, slots=True)
class Serving:
    """What there is once the model is open and the plan is made."""

    setup: Setup
    requests: Requests
    passes: Passes
    losses: Losses


class Stopping(Exception):
    """The coordinator was told to stop."""


class Coordinator:
    """`with Coordinator(config, run_dir, expected) as coordinator: coordinator.run()`; no process is left behind."""

    def __init__(
        self,
        config: EngineConfig,
        run_dir: Path,
        expected: Workload | None,
        predicted: Prediction | None = None,
        share: EngineShare | None = None,
    ) -> None:
        self._config = config
        self._share = share
        self._predicted = predicted
        self._run_dir = run_dir
        self._expected = expected
        self._machine = inspect_machine(engines=1 if share is None else share.count)
        try:
            lanes = Lanes(config.trace, lambda text: log(f"warning: {text}"))
        except OSError as error:
            raise plan.PlanError(f"trace={config.trace} cannot be written: {error.strerror}") from error
        self._arenas = {name: Arena(name) for name in ("weights", "kv", "exchange", "states")}
        own = dict(self._arenas)
        if share is not None:
            self._arenas[SHARED] = Arena.inherited(SHARED, share.arena_fd)
        self._parked = open_park_file(config)
        # What engines share is counted once, by the first.
        counted = self._arenas if share is None or share.number == 0 else own
        self._stats = EngineStats(lanes, MemoryUse(counted.values()))
        self._loop = EventLoop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._workers = WorkerSupervisor(
            self._loop,
            self._context,
            run_dir,
            self._arenas if self._parked is None else {**self._arenas, "parked": self._parked},
            self._stats.memory,
            self._handle,
            lambda name, line: log(f"{name}: {line}"),
            self._lost,
        )
        self._frontend = Frontend(
            self._loop,
            self._context,
            self._handle_client,
            lambda text: log(f"a client sent what is not a message: {text}"),
            lambda client: self._served.requests.forget(client),
        )
        self._opened: worker_messages.ModelOpened | None = None
        self._warm: dict[str, int] = {}  # private memory of attention workers that have their kernels
        self._lanes = 0  # see worker_messages.WarmedUp
        self._serving: Serving | None = None
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> Self:
        self._stats.memory.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write)
        self._loop.watch(self._wake_read, self._stop)
        self._loop.watch(sys.stdin.fileno(), self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._serving is not None:
            text = "the engine was stopped" if error is None or isinstance(error, Stopping) else str(error)
            self._frontend.tell_the_end(self._serving.requests.clients(), text)
        self._workers.stop()
        self._stats.close()
        self._frontend.close()
        self._context.destroy(linger=500)
        for arena in self._arenas.values():
            arena.close()
        if self._parked is not None:
            self._parked.close()

    def run(self) -> None:
        """Start everything and serve until told to stop. Raises WorkerDied, PlanError or Stopping."""
        self._workers.start(num_attention_workers(self._config, self._machine))
        self._bring_up(self._workers.compute)
        deadline = time.monotonic() + self._config.start_timeout
        while self._workers.not_ready or self._serving is None or not self._serving.passes.weights.is_quiet:
            if time.monotonic() > deadline:
                raise WorkerDied(
                    f"not ready after {self._config.start_timeout:g} s: {self._standing()}; "
                    "raise start_timeout if it was only slow"
                )
            self._step(deadline)
        endpoint = self._config.endpoint or f"ipc://{self._run_dir}/engine.sock"
        key = read_key_file(self._config.key_file) if self._config.key_file else None
        endpoint = self._frontend.open(endpoint, key)
        # What it took to have the weights in order is over.
        self._stats.memory.plan(self._serving.setup.plan.process_bytes)
        emit("ready", endpoint=endpoint)
        while True:
            self._step(None)

    def _step(self, deadline: float | None) -> None:
        """One round of the event loop; before the engine is ready, `deadline` is all there is of deadlines."""
        limit = deadline
        if deadline is None:
            limit = min((since for _, since in self._awaited()), default=None)
            limit = None if limit is None else limit + self._config.worker_timeout
        passes = self._serving.passes if self._serving else None
        begin_at = passes.begin_at if passes else None
        limits = [moment for moment in (limit, begin_at) if moment is not None]
        self._loop.step(max(0, int((min(limits) - time.monotonic()) * 1000) + 1) if limits else None)
        if passes is not None and passes.begin_at is not None and time.monotonic() >= passes.begin_at:
            passes.begin_at = None
            passes.begin()
        if deadline is None:
            for worker in overdue(self._awaited(), self._config.worker_timeout):
                self._workers.lose(worker, self._silence(worker))

    def _stop(self) -> None:
        raise Stopping

    def _awaited(self) -> list[tuple[WorkerProcess, float]]:
        """The workers that owe an answer, and since when."""
        owing = []
        for worker in self._workers:
            if not self._workers.is_ready(worker):  # importing and opening take what they take
                grace = self._config.start_timeout - self._config.worker_timeout
                owing.append((worker, worker.started + max(0.0, grace)))
            elif worker.outstanding:
                owing.append((worker, worker.waiting_since))
        if self._serving is not None:
            owing += self._serving.passes.awaited()
        return owing

    def _silence(self, worker: WorkerProcess) -> WorkerDied:
        return WorkerDied(
            f"{worker.name} (process {worker.pid}) has not answered for {self._config.worker_timeout:g} s: "
            f"{self._standing()}; raise worker_timeout if it was only slow"
        )

    def _standing(self) -> str:
        if self._serving is None or self._workers.not_ready:
            return f"waiting for {', '.join(sorted(self._workers.not_ready)) or 'the model'}"
        return self._serving.passes.standing()

    # ------------------------------------------------------------------------------------------------ start

    def _bring_up(self, worker: WorkerProcess) -> None:
        """Gives a new worker process what it needs, as far as it is known; the rest when it is."""
        config = self._config
        if worker.kind == "compute":
            # "auto" is measured: it might differ.
            dtype = self._serving.setup.spec.dtype if self._serving else config.dtype
            worker.send(order_to_open(config, dtype))
        elif self._serving is not None:
            self._attach(worker, self._serving)
        elif worker.kind == "attention" and self._opened is not None:
            worker.send(self._warm_up(self._opened))

    def _warm_up(self, opened: worker_messages.ModelOpened) -> worker_messages.WarmUp:
        return worker_messages.WarmUp(opened.spec.dtype, self._config.stored_kv_dtype(opened.spec.dtype))

    def _model_opened(self, message: worker_messages.ModelOpened) -> None:
        if self._serving is None:
            self._opened = message
            for worker in self._workers:
                if worker.kind == "attention":
                    worker.send(self._warm_up(message))
            return
        opened = self._serving.setup.opened
        if (message.spec, message.fingerprint) != (opened.spec, opened.fingerprint):
            raise plan.PlanError(f"{self._config.model} changed while it was in use: start again")
        self._attach(self._workers.compute, self._serving)

    def _warmed_up(self, worker: WorkerProcess, message: worker_messages.WarmedUp) -> None:
        """The plan is made once it is known what every process takes."""
        self._warm[worker.name], self._lanes = message.resident_bytes, message.lanes
        missing = [w for w in self._workers if w.kind == "attention" and w.name not in self._warm]
        if self._serving is None and self._opened is not None and not missing:
            self._begin_serving(self._opened)

    def _begin_serving(self, message: worker_messages.ModelOpened) -> None:
        tokenizer = open_tokenizer(message.tokenizer_file)
        give_back_memory()  # reading a tokenizer takes twice what it takes when it is read
        processes = Measured(message.resident_bytes, resident_bytes()[0], max(self._warm.values()))
        setup = set_up(message, self._config, self._machine, self._expected, processes, self._share)
        emit("plan", text=describe(setup.plan, setup.spec), decided=setup.decided)
        self._stats.trace_about(self._config, setup, self._predicted)
        for warning in (*setup.spec.warnings, *setup.plan.warnings):
            log(f"warning: {warning}")
        self._stats.memory.plan(setup.plan.process_bytes)
        for name, num_bytes in setup.arena_bytes.items():
            self._arenas[name].resize(num_bytes)
        setup = with_kv_on_disk(setup, self._config, self._lanes)
        requests = setup.make_requests(self._config.prefix_caching, tokenizer)
        passes = Passes(setup, requests, self._workers, self._stats, self._answer)
        losses = Losses(passes, requests, self._workers, self._answer)
        self._serving = Serving(setup, requests, passes, losses)
        for worker in self._workers:
            self._attach(worker, self._serving)
        passes.weights.carry_out(passes.schedule.start())

    def _attach(self, worker: WorkerProcess, serving: Serving) -> None:
        setup, weights = serving.setup, serving.passes.weights
        if worker.kind == "loader":
            worker.send(setup.for_loader(self._config.load_format, self._config.verify_weights is True))
            weights.loader_attached()
            serving.passes.kv.loader_attached()
        elif worker.kind == "attention":
            worker.send(setup.for_attention(worker.index))
        else:
            worker.send(setup.for_compute())
            weights.compute_attached()

    # ------------------------------------------------------------------------------------------------ workers

    @property
    def _served(self) -> Serving:
        assert self._serving is not None, "work before the model was opened"
        return self._serving

    def _handle(self, worker: WorkerProcess, message: Any) -> None:
        match message:
            case worker_messages.ComputeReport():
                self._served.passes.computed(message)
            case worker_messages.AttentionReport():
                self._served.passes.attended(worker, message)
            case worker_messages.Loaded():
                self._stats.loaded(message)
                self._workers.did_something(worker)
                self._served.passes.weights.loaded(message)
            case KvMoved():
                self._workers.did_something(worker)
                self._served.passes.kv.moved(message)
            case PrefixesOpened():
                self._served.passes.kv.opened(message)
            case worker_messages.Packed():
                self._stats.packed(message)
                self._served.passes.weights.was_packed(message)
            case worker_messages.Uploaded():
                self._stats.uploaded(message)
                self._served.passes.weights.uploaded(message)
            case worker_messages.ModelOpened():
                self._model_opened(message)
            case worker_messages.WarmedUp():
                self._warmed_up(worker, message)
            case worker_messages.Ready():
                self._workers.ready(worker)
                if worker.number > 0:
                    log(f"{worker.name} (process {worker.pid}) is ready")
            case worker_messages.Abandoned():
                self._served.losses.abandoned(worker)
        if self._serving is not None:
            self._serving.losses.go_on()

    def _lost(self, worker: WorkerProcess, error: WorkerDied) -> None:
        """A worker's process is gone: another takes its place."""
        serving = self._serving
        broken = serving is not None and serving.losses.breaks_pass(worker)
        self._stats.trace_loss(worker.name, str(error))
        log(f"{error}; starting it again{'; the pass is repeated' if broken else ''}")
        if serving is not None:
            serving.losses.lost(worker, error)
        elif worker.kind == "compute":
            self._opened = None  # the next one opens it anew
        self._bring_up(self._workers.start_again(worker))

    # ------------------------------------------------------------------------------------------------ clients

    def _handle_client(self, client: bytes, message: Any) -> None:
        match message:
            case client_messages.Connect():
                self._frontend.send(client, self._welcome())
            case client_messages.Submit():
                self._answer(self._served.requests.submit(client, message))
                self._served.passes.begin_soon()
            case client_messages.Cancel():
                self._answer(self._served.requests.cancel(client, message.job_id))
            case client_messages.ReadDeltas():
                self._served.requests.deltas_read(client, message.count)
            case client_messages.GetStatus():
                self._frontend.send(client, self._status())

    def _answer(self, answers: Iterable[Answer]) -> None:
        for client, message in answers:
            self._frontend.send(client, message)

    def _welcome(self) -> client_messages.Welcome:
        setup = self._served.setup
        return client_messages.Welcome(
            client_messages.PROTOCOL,
            self._config.model,
            setup.fingerprint,
            setup.spec.max_length,
            MAX_OPEN,
            describe(setup.plan, setup.spec),
            setup.opened.chat_template,
        )

    def _status(self) -> client_messages.Status:
        requests = self._served.requests
        totals = {**requests.totals, "restarts": self._workers.restarts, "sent_back": requests.num_preempted}
        totals |= dict.fromkeys(KV_DISK_TOTALS, 0) | (requests.disk.totals if requests.disk is not None else {})
        totals["shared_prompt_tokens"] = requests.num_shared
        return self._stats.status(requests.num_running, requests.num_waiting, totals, self._served.setup.ram)

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

from flexgen_lite.config.engine import ConfigError, EngineConfig
from flexgen_lite.engine.event_loop import EventLoop
from flexgen_lite.engine.frontend import Frontend
from flexgen_lite.engine.lanes import Lanes
from flexgen_lite.engine.setup import Setup, open_tokenizer, set_up
from flexgen_lite.engine.stats import EngineStats
from flexgen_lite.engine.weight_flow import WeightFlow
from flexgen_lite.engine.worker_process import WorkerDied, WorkerProcess
from flexgen_lite.engine.worker_supervisor import FINAL, WorkerSupervisor, overdue
from flexgen_lite.memory.arena import Arena
from flexgen_lite.memory.usage import MemoryUse, give_back_memory, resident_bytes
from flexgen_lite.plan import plan
from flexgen_lite.plan.machine import inspect_machine
from flexgen_lite.plan.text import describe
from flexgen_lite.plan.workload import Workload
from flexgen_lite.queue.batching import MicroBatch, Result
from flexgen_lite.queue.poison_requests import TRIES, PoisonRequests
from flexgen_lite.queue.requests import MAX_OPEN, Answer, Requests
from flexgen_lite.schedule.zigzag import RunColumns, Schedule
from flexgen_lite.text.sizes import format_size
from flexgen_lite.wire import client_messages, worker_messages
from flexgen_lite.wire.access import KeyFileError, read_key_file

GATHER_PAUSE = 0.02  # seconds without a new request after which an idle engine begins
GATHER_SECONDS = 0.5  # at most, since the first request
MOST_GUILTY = 5  # requests in a row that make workers fail; that all do so is no fault of theirs


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

    def __init__(self, config: EngineConfig, run_dir: Path, expected: Workload | None) -> None:
        self._config = config
        self._run_dir = run_dir
        self._expected = expected
        self._machine = inspect_machine()
        try:
            lanes = Lanes(config.trace, lambda text: log(f"warning: {text}"))
        except OSError as error:
            raise plan.PlanError(f"trace={config.trace} cannot be written: {error.strerror}") from error
        self._arenas = {name: Arena(name) for name in ("weights", "kv", "exchange")}
        self._stats = EngineStats(lanes, MemoryUse(self._arenas.values()))
        self._loop = EventLoop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._workers = WorkerSupervisor(
            self._loop,
            self._context,
            run_dir,
            self._arenas,
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
            lambda client: self._queue.forget(client),
        )
        self._opened: worker_messages.ModelOpened | None = None
        self._warm: dict[str, int] = {}  # private memory of attention workers that have their kernels
        self._setup: Setup | None = None
        self._schedule: Schedule | None = None
        self._weights: WeightFlow | None = None
        self._requests: Requests | None = None
        self._begin_at: float | None = None  # when to start the first pass of an idle engine
        self._gathering_since = 0.0
        self._pass_id = 0
        self._pass: list[MicroBatch] = []
        self._pass_results: list[Result] = []
        self._progress = 0.0  # when something of the pass was last heard of, monotonic seconds
        self._suspended = False  # a worker was lost: nothing begins until all is quiet and everyone is there again
        self._broken: WorkerDied | None = None  # what ended the present pass without a result
        self._abandoning: set[str] = set()  # workers that were told to drop the pass, and have not answered
        self._given_up: list[tuple[int, str]] = []  # requests found guilty, and why; told once another pass has ended
        self._poison = PoisonRequests()
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
        if self._requests is not None:
            text = "the engine was stopped" if error is None or isinstance(error, Stopping) else str(error)
            self._frontend.tell_the_end(self._requests.clients(), text)
        self._workers.stop()
        self._stats.close()
        self._frontend.close()
        self._context.destroy(linger=500)
        for arena in self._arenas.values():
            arena.close()

    def run(self) -> None:
        """Start everything and serve until told to stop. Raises WorkerDied, PlanError or Stopping."""
        self._workers.start(plan.num_attention_workers(self._config, self._machine))
        self._bring_up(self._workers.compute)
        deadline = time.monotonic() + self._config.start_timeout
        while self._weights is None or self._workers.not_ready or not self._weights.is_quiet:
            if time.monotonic() > deadline:
                raise WorkerDied(
                    f"not ready after {self._config.start_timeout:g} s: {self._standing()}; "
                    "raise start_timeout if it was only slow"
                )
            self._step(deadline)
        endpoint = self._config.endpoint or f"ipc://{self._run_dir}/engine.sock"
        endpoint = self._frontend.open(
            endpoint, read_key_file(self._config.key_file) if self._config.key_file else None
        )
        self._stats.memory.plan(self._plan.process_bytes)  # what it took to have the weights in order is over
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
        if self._pass and not self._suspended:
            compute, attention = self._scheduler.waits_for()
            owing += [(self._workers.compute, self._progress)] * compute
            owing += [(self._workers.attention(index), self._progress) for index in sorted(attention)]
        return owing

    def _silence(self, worker: WorkerProcess) -> WorkerDied:
        return WorkerDied(
            f"{worker.name} (process {worker.pid}) has not answered for {self._config.worker_timeout:g} s: "
            f"{self._standing()}; raise worker_timeout if it was only slow"
        )

    def _standing(self) -> str:
        if self._schedule is None or self._workers.not_ready:
            return f"waiting for {', '.join(sorted(self._workers.not_ready)) or 'the model'}"
        if not self._pass:
            return "loads of weights are open"
        return f"pass {self._pass_id}, {self._schedule.standing()}"

    # ------------------------------------------------------------------------------------------------ start

    def _bring_up(self, worker: WorkerProcess) -> None:
        """Gives a new worker process what it needs, as far as it is known; the rest when it is."""
        config = self._config
        if worker.kind == "compute":
            dtype = self._setup.spec.dtype if self._setup else config.dtype  # "auto" is measured: it might differ
            worker.send(
                worker_messages.OpenModel(
                    config.model, config.load_format, dtype, config.device, False, config.max_model_len
                )
            )
        elif self._setup is not None:
            self._attach(worker)
        elif worker.kind == "attention" and self._opened is not None:
            worker.send(worker_messages.WarmUp(self._opened.spec.dtype))

    def _model_opened(self, message: worker_messages.ModelOpened) -> None:
        if self._setup is None:
            self._opened = message
            for worker in self._workers:
                if worker.kind == "attention":
                    worker.send(worker_messages.WarmUp(message.spec.dtype))
            return
        opened = self._setup.opened
        if (message.spec, message.fingerprint) != (opened.spec, opened.fingerprint):
            raise plan.PlanError(f"{self._config.model} changed while it was in use: start again")
        self._attach(self._workers.compute)

    def _warmed_up(self, worker: WorkerProcess, message: worker_messages.WarmedUp) -> None:
        """The plan is made once it is known what every process takes."""
        self._warm[worker.name] = message.resident_bytes
        missing = [w for w in self._workers if w.kind == "attention" and w.name not in self._warm]
        if self._setup is None and self._opened is not None and not missing:
            self._make_setup(self._opened)

    def _make_setup(self, message: worker_messages.ModelOpened) -> None:
        tokenizer = open_tokenizer(message.tokenizer_file)
        give_back_memory()  # reading a tokenizer takes twice what it takes when it is read
        processes = plan.Measured(message.resident_bytes, resident_bytes()[0], max(self._warm.values()))
        setup = self._setup = set_up(message, self._config, self._machine, self._expected, processes)
        emit("plan", text=describe(setup.plan, setup.spec), decided=setup.decided)
        self._stats.trace_about(self._config, setup)
        for warning in (*setup.spec.warnings, *setup.plan.warnings):
            log(f"warning: {warning}")
        self._stats.memory.plan(setup.plan.process_bytes)
        for name, num_bytes in setup.arena_bytes.items():
            self._arenas[name].resize(num_bytes)
        self._schedule = setup.make_schedule()
        share = self._config.prefix_caching
        self._requests = setup.make_requests(setup.spec.dtype == "float32" if share is None else share, tokenizer)
        self._weights = WeightFlow(
            self._workers, self._schedule, setup.packed_units, setup.plan.copy_head, self._compute_columns
        )
        for worker in self._workers:
            self._attach(worker)
        self._weights.carry_out(self._schedule.start())

    def _attach(self, worker: WorkerProcess) -> None:
        assert self._setup is not None
        if worker.kind == "loader":
            worker.send(self._setup.for_loader(self._config.load_format, self._config.verify_weights is True))
            self._flow.loader_attached()
        elif worker.kind == "attention":
            worker.send(self._setup.for_attention(_number(worker)))
        else:
            worker.send(self._setup.for_compute())
            self._flow.compute_attached()

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

    @property
    def _plan(self) -> plan.Plan:
        assert self._setup is not None, "work before the model was opened"
        return self._setup.plan

    def _handle(self, worker: WorkerProcess, message: Any) -> None:
        match message:
            case worker_messages.ComputeReport():
                self._computed(message)
            case worker_messages.AttentionReport():
                self._attended(worker, message)
            case worker_messages.Loaded():
                self._stats.loaded(message)
                self._workers.did_something(worker)
                self._flow.loaded(message)
            case worker_messages.Packed():
                self._stats.packed(message)
                self._flow.was_packed(message)
            case worker_messages.Uploaded():
                self._stats.uploaded(message)
                self._flow.uploaded(message)
            case worker_messages.ModelOpened():
                self._model_opened(message)
            case worker_messages.WarmedUp():
                self._warmed_up(worker, message)
            case worker_messages.Ready():
                self._workers.ready(worker)
                if worker.number > 0:
                    log(f"{worker.name} (process {worker.pid}) is ready")
            case worker_messages.Abandoned():
                self._abandoning.discard(worker.name)
        self._go_on()

    def _computed(self, report: worker_messages.ComputeReport) -> None:
        if report.pass_id != self._pass_id or self._suspended:
            return
        self._progress = time.monotonic()
        self._stats.computed(report)
        for done in report.done:
            if done.left_only:
                self._flow.carry_out(self._scheduler.layer_left(done.layer, done.micro_batch))
                continue
            if done.layer == self._scheduler.num_layers:
                self._pass_results[done.micro_batch] = Result(done.token_ids, done.logprobs, done.prompt_logprobs)
            self._flow.carry_out(self._scheduler.segment_done(done.layer, done.micro_batch))
        if self._scheduler.pass_done:
            self._end_pass()

    def _attended(self, worker: WorkerProcess, report: worker_messages.AttentionReport) -> None:
        self._progress = time.monotonic()
        self._stats.attended(worker.name, report)
        if report.pass_id == self._pass_id and self._pass and not self._suspended:
            for done in report.done:
                self._scheduler.attended(done.layer, done.micro_batch, _number(worker))

    def _compute_columns(self, order: RunColumns) -> None:
        self._progress = time.monotonic()
        self._workers.compute.send(
            worker_messages.Segments(self._pass_id, order.layer, order.slots), expects_answer=False
        )

    # ------------------------------------------------------------------------------------------------ losses

    def _lost(self, worker: WorkerProcess, error: WorkerDied) -> None:
        """A worker's process is gone: another takes its place. Without the compute worker or an attention worker the
        pass ends without a result; what was stored before it is still there."""
        self._abandoning.discard(worker.name)
        broken = bool(self._pass) and worker.kind != "loader" and not self._suspended
        self._stats.trace_loss(worker.name, str(error))
        log(f"{error}; starting it again{'; the pass is repeated' if broken else ''}")
        if worker.kind == "compute" and self._setup is None:
            self._opened = None  # the next one opens it anew
        if self._weights is not None and self._schedule is not None:
            if worker.kind == "loader":
                self._weights.loader_lost()
            elif worker.kind == "compute":
                self._weights.compute_lost()
            if broken or worker.kind == "compute":
                self._schedule.suspend()
                self._suspended = True
        if broken:
            self._workers.did_something(worker)  # how often a pass may fail is a matter of its own
            self._abandon_pass()
            self._broken = error
        self._bring_up(self._workers.start_again(worker))

    def _abandon_pass(self) -> None:
        """Nobody who is left writes anything of the pass once all have answered."""
        for worker in self._workers:
            if worker.kind != "loader" and self._workers.is_ready(worker):
                worker.send(worker_messages.Abandon())
                self._abandoning.add(worker.name)

    def _go_on(self) -> None:
        """Back to work once everyone is there and nothing is on its way."""
        if self._weights is None or self._workers.not_ready:
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
        as_it_is, guilty = self._poison.failed(ids, max(micro_batch.num_rows for micro_batch in self._pass))
        if as_it_is:
            self._start_pass()
            return
        self._pass = []
        self._stats.pass_ends(f"pass {self._pass_id}, given up")
        if guilty is not None:
            text = f"{TRIES} times in a row a worker was lost while it computed this request alone, at last: {error}"
            self._queue.set_aside(guilty)
            self._given_up.append((guilty, text))
            if len(self._given_up) >= MOST_GUILTY:
                raise WorkerDied(
                    f"a worker was lost again and again with each of {MOST_GUILTY} requests in a row, so it is not the "
                    f"requests; the last time: {error}",
                    error.details,
                    error.kind,
                )
        self._begin_pass()
        if not self._pass:
            self._tell_the_guilty()

    def _tell_the_guilty(self) -> None:
        for request_id, text in self._given_up:
            log(f"a request is given up: {text}")
            self._answer(self._queue.fail(request_id, text))
        self._given_up.clear()

    # ------------------------------------------------------------------------------------------------ passes

    def _begin_soon(self) -> None:
        """Begin when no more requests come in: a pass costs a load of the weights whatever rides on it."""
        if not self._pass:
            now = time.monotonic()
            self._gathering_since = now if self._begin_at is None else self._gathering_since
            self._begin_at = min(now + GATHER_PAUSE, self._gathering_since + GATHER_SECONDS)

    def _begin_pass(self) -> None:
        """Compose and start the next pass, if there is work, nothing running, and nobody missing."""
        if self._pass or self._suspended or self._workers.not_ready:
            return
        self._begin_at = None
        self._answer(self._queue.drop_cancelled())
        self._pass = self._queue.next_pass(self._poison.group)
        while not self._pass and self._poison.group is not None:  # they were cancelled
            self._poison.skip()
            self._pass = self._queue.next_pass(self._poison.group)
        if self._pass:
            self._stats.pass_begins()
            self._start_pass()

    def _start_pass(self) -> None:
        """The composed pass, under a number of its own."""
        made = self._plan
        self._pass_id += 1
        self._progress = time.monotonic()
        self._pass_results = [Result(())] * len(self._pass)
        assert self._setup is not None
        self._stats.traffic["kv_read_bytes"] += self._setup.kv_read_bytes(self._pass)
        token_batches = tuple(m.token_batch(k) for k, m in enumerate(self._pass))
        self._workers.compute.send(
            worker_messages.BeginCompute(self._pass_id, made.compute_threads, token_batches), expects_answer=False
        )
        for index in range(made.attention_workers):
            batches = tuple(m.kv_batch(k, index) for k, m in enumerate(self._pass) if index in m.workers())
            self._workers.attention(index).send(
                worker_messages.BeginAttention(self._pass_id, made.attention_threads, batches), expects_answer=False
            )
        self._flow.carry_out(self._scheduler.begin_pass([m.workers() for m in self._pass]))

    def _end_pass(self) -> None:
        self._stats.pass_ends(f"pass {self._pass_id}")
        done, self._pass = self._pass, []
        if too_many := self._poison.passed():
            rows = self._queue.limit_rows(too_many // 2)
            log(f"passes of {too_many} rows made a worker fail, parts of them did not: at most {rows} from now on")
        self._tell_the_guilty()
        for worker in self._workers:
            self._workers.did_something(worker)
        answers = self._queue.end_pass(done, self._pass_results)
        self._queue.totals["passes"] += 1
        self._stats.trace_counters(self._queue.num_running, self._queue.num_waiting, self._queue.totals)
        self._begin_pass()  # first, so that the workers are busy while the answers go out
        self._answer(answers)
        self._warn_of_memory()

    def _warn_of_memory(self) -> None:
        for name, used, planned in self._stats.memory.beyond_plan():
            log(f"warning: {name} takes {format_size(used)} of memory where {format_size(planned)} were planned")

    # ------------------------------------------------------------------------------------------------ clients

    def _handle_client(self, client: bytes, message: Any) -> None:
        match message:
            case client_messages.Connect():
                self._frontend.send(client, self._welcome())
            case client_messages.Submit():
                self._answer(self._queue.submit(client, message))
                self._begin_soon()
            case client_messages.Cancel():
                self._answer(self._queue.cancel(client, message.job_id))
            case client_messages.ReadDeltas():
                self._queue.deltas_read(client, message.count)
            case client_messages.GetStatus():
                self._frontend.send(client, self._status())

    def _answer(self, answers: Iterable[Answer]) -> None:
        for client, message in answers:
            self._frontend.send(client, message)

    def _welcome(self) -> client_messages.Welcome:
        assert self._setup is not None
        opened, text = self._setup.opened, describe(self._plan, self._setup.spec)
        return client_messages.Welcome(
            client_messages.PROTOCOL,
            self._config.model,
            opened.fingerprint,
            opened.spec.max_length,
            MAX_OPEN,
            text,
            opened.chat_template,
        )

    def _status(self) -> client_messages.Status:
        queue, totals = self._queue, {**self._queue.totals}
        totals |= {"restarts": self._workers.restarts, "sent_back": queue.num_sent_back}
        totals["shared_prompt_tokens"] = queue.num_shared
        return self._stats.status(queue.num_running, queue.num_waiting, totals, self._plan.ram)


def _number(attention_worker: WorkerProcess) -> int:
    return int(attention_worker.name.rpartition(" ")[2])


def main() -> int:
    order = json.loads(_first_line(sys.stdin.fileno()))
    run_dir = Path(order["run_dir"])
    try:
        config = EngineConfig.from_json(json.dumps(order["config"]))
        expected = Workload.from_dict(order.get("expected"))
        with Coordinator(config, run_dir, expected) as coordinator:
            coordinator.run()
    except Stopping:
        return 0
    except (ConfigError, KeyFileError, plan.PlanError) as error:
        emit("failed", message=str(error), user_error=True, details="")
        return 2
    except WorkerDied as error:
        comes_again = error.kind in FINAL
        emit("failed", message=str(error), user_error=error.user_error, details=error.details, comes_again=comes_again)
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

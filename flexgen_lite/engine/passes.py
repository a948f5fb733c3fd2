"""Passes through the layers, one after the other: composed of requests, given to the workers, heard of, ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from flexgen_lite.engine.events import log
from flexgen_lite.engine.kv_flow import KvFlow
from flexgen_lite.engine.setup import Setup
from flexgen_lite.engine.stats import EngineStats
from flexgen_lite.engine.weight_flow import WeightFlow
from flexgen_lite.engine.worker_process import WorkerProcess
from flexgen_lite.engine.worker_supervisor import WorkerSupervisor
from flexgen_lite.queue.client_jobs import Answer
from flexgen_lite.queue.micro_batch import MicroBatch, Result
from flexgen_lite.queue.poison_requests import PoisonRequests
from flexgen_lite.queue.requests import Requests
from flexgen_lite.schedule.zigzag import RunColumns, Schedule
from flexgen_lite.wire import worker_messages

GATHER_PAUSE = 0.02  # seconds without a new request after which an idle engine begins
GATHER_SECONDS = 0.5  # at most, since the first request


class Passes:
    """One pass at a time.

    Args:
        answer: is given what clients are to be told.

    Attributes:
        begin_at: when to start the first pass of an idle engine, monotonic seconds; None where it need not be waited
            for.
        running: micro-batches of the present pass, none between passes.
        suspended: nothing begins and no report counts: a worker was lost (losses.py).
        poison: says what the next pass may hold.
        on_end: is called when a pass has ended with a result, before the next one begins.
    """

    def __init__(
        self,
        setup: Setup,
        requests: Requests,
        workers: WorkerSupervisor,
        stats: EngineStats,
        answer: Callable[[Iterable[Answer]], None],
    ) -> None:
        self._setup = setup
        self._requests = requests
        self._workers = workers
        self._stats = stats
        self._columns = setup.spec.column_names
        self._answer = answer
        self.schedule: Schedule = setup.make_schedule()
        self.weights = WeightFlow(
            workers,
            self.schedule,
            setup.packed_units,
            setup.units_there,
            setup.plan.copy_head,
            self._compute_columns,
        )
        self.kv = KvFlow(workers, requests, stats, answer)
        self.begin_at: float | None = None
        self.running: list[MicroBatch] = []
        self.suspended = False
        self.poison = PoisonRequests()
        self.on_end: Callable[[], None] = lambda: None
        self._gathering_since = 0.0
        self._id = 0
        self._results: list[Result] = []
        self._progress = 0.0  # when something of the pass was last heard of, monotonic seconds

    @property
    def name(self) -> str:
        return f"pass {self._id}"

    def awaited(self) -> list[tuple[WorkerProcess, float]]:
        """The workers that the pass waits for, and since when."""
        if not self.running or self.suspended:
            return []
        compute, attention = self.schedule.waits_for()
        owing = [self._workers.compute] * compute + [self._workers.attention(index) for index in sorted(attention)]
        return [(worker, self._progress) for worker in owing]

    def standing(self) -> str:
        """Where it stands, for messages."""
        return f"{self.name}, {self.schedule.standing()}" if self.running else "loads of weights are open"

    # ------------------------------------------------------------------------------------------------ begin

    def begin_soon(self) -> None:
        """Begin when no more requests come in: a pass costs a load of the weights whatever rides on it."""
        if not self.running:
            now = time.monotonic()
            self._gathering_since = now if self.begin_at is None else self._gathering_since
            self.begin_at = min(now + GATHER_PAUSE, self._gathering_since + GATHER_SECONDS)

    def begin(self) -> None:
        """Compose and start the next pass, if there is work, nothing running, and nobody missing."""
        if self.running or self.suspended or self._workers.not_ready:
            return
        self.begin_at = None
        self._answer(self._requests.drop_cancelled())
        self.running = self._requests.next_pass(self.poison.group)
        while not self.running and self.poison.group is not None and not self._requests.waits_for_disk:
            self.poison.skip()  # they were cancelled
            self.running = self._requests.next_pass(self.poison.group)
        self.kv.send()
        if self.running:
            self._stats.pass_begins()
            self.start()

    def start(self) -> None:
        """The composed pass, under a number of its own."""
        made = self._setup.plan
        self._id += 1
        self._progress = time.monotonic()
        self._results = [Result(())] * len(self.running)
        self._stats.traffic["kv_read_bytes"] += self._setup.kv_read_bytes(self.running)
        self._stats.traffic["state_bytes"] += self._setup.moved_state_bytes(self.running)
        token_batches = tuple(m.token_batch(k) for k, m in enumerate(self.running))
        self._workers.compute.send(
            worker_messages.BeginCompute(self._id, made.compute_threads, token_batches), expects_answer=False
        )
        for index in range(made.attention_workers):
            batches = tuple(m.kv_batch(k, index) for k, m in enumerate(self.running) if index in m.workers())
            self._workers.attention(index).send(
                worker_messages.BeginAttention(self._id, made.attention_threads, batches), expects_answer=False
            )
        self.weights.carry_out(self.schedule.begin_pass([m.workers() for m in self.running]))

    # ------------------------------------------------------------------------------------------------ on the way

    def _compute_columns(self, order: RunColumns) -> None:
        self._progress = time.monotonic()
        self._workers.compute.send(worker_messages.Segments(self._id, order.column, order.slots), expects_answer=False)

    def computed(self, report: worker_messages.ComputeReport) -> None:
        if report.pass_id != self._id or self.suspended:
            return
        self._progress = time.monotonic()
        self._stats.computed(report, self._columns)
        for done in report.done:
            if done.left_only:
                self.weights.carry_out(self.schedule.column_left(done.column, done.micro_batch))
                continue
            if done.column == self.schedule.num_columns:
                self._results[done.micro_batch] = Result(done.token_ids, done.logprobs, done.prompt_logprobs)
            self.weights.carry_out(self.schedule.segment_done(done.column, done.micro_batch))
        if self.schedule.pass_done:
            self._end()

    def attended(self, worker: WorkerProcess, report: worker_messages.AttentionReport) -> None:
        self._progress = time.monotonic()
        self._stats.attended(worker.name, report, self._columns)
        if report.pass_id == self._id and self.running and not self.suspended:
            for done in report.done:
                self.schedule.attended(done.column, done.micro_batch, worker.index)

    # ------------------------------------------------------------------------------------------------ end

    def drop(self) -> None:
        """The present pass ends without a result."""
        self.running = []
        self._stats.pass_ends(f"{self.name}, given up")

    def _end(self) -> None:
        self._stats.pass_ends(self.name)
        done, self.running = self.running, []
        if too_many := self.poison.passed():
            rows = self._requests.limit_rows(too_many // 2)
            log(f"passes of {too_many} rows made a worker fail, parts of them did not: at most {rows} from now on")
        self.on_end()
        for worker in self._workers:
            self._workers.did_something(worker)
        answers = self._requests.end_pass(done, self._results)
        self.kv.send()
        self._requests.totals["passes"] += 1
        self._stats.trace_counters(self._requests.num_running, self._requests.num_waiting, self._requests.totals)
        self.begin()  # first, so that the workers are busy while the answers go out
        self._answer(answers)
        self._stats.warn_of_memory()

"""What becomes of the pass when a worker is lost: it is repeated, or parts of it are, or a request is given up."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flexgen_lite.engine.events import log
from flexgen_lite.engine.passes import Passes
from flexgen_lite.engine.worker_process import WorkerDied, WorkerProcess
from flexgen_lite.engine.worker_supervisor import WorkerSupervisor
from flexgen_lite.queue.client_jobs import Answer
from flexgen_lite.queue.poison_requests import TRIES
from flexgen_lite.queue.requests import Requests
from flexgen_lite.wire import worker_messages

MOST_GUILTY = 5  # requests in a row that make workers fail; that all do so is no fault of theirs


class Losses:
    """After a loss nothing begins until everyone is there again and nothing is on its way."""

    def __init__(
        self,
        passes: Passes,
        requests: Requests,
        workers: WorkerSupervisor,
        answer: Callable[[Iterable[Answer]], None],
    ) -> None:
        self._passes = passes
        passes.on_end = self.tell_the_guilty
        self._requests = requests
        self._workers = workers
        self._answer = answer
        self._broken: WorkerDied | None = None  # what ended the present pass without a result
        self._abandoning: set[str] = set()  # workers that were told to drop the pass, and have not answered
        self._given_up: list[tuple[int, str]] = []  # requests found guilty, and why; told once another pass has ended

    def breaks_pass(self, worker: WorkerProcess) -> bool:
        """Whether the present pass ends without a result if this worker is lost."""
        return bool(self._passes.running) and worker.kind != "loader" and not self._passes.suspended

    def lost(self, worker: WorkerProcess, error: WorkerDied) -> None:
        """Without the compute worker or an attention worker the pass ends without a result; what was stored before it
        is still there."""
        self._abandoning.discard(worker.name)
        broken = self.breaks_pass(worker)
        if worker.kind == "loader":
            self._passes.weights.loader_lost()
            self._passes.kv.loader_lost()
        elif worker.kind == "compute":
            self._passes.weights.compute_lost()
        if broken or worker.kind == "compute":
            self._passes.schedule.suspend()
            self._passes.suspended = True
        if broken:
            self._workers.did_something(worker)  # how often a pass may fail is a matter of its own
            self._abandon_pass()
            self._broken = error

    def _abandon_pass(self) -> None:
        """Nobody who is left writes anything of the pass once all have answered."""
        for worker in self._workers:
            if worker.kind != "loader" and self._workers.is_ready(worker):
                worker.send(worker_messages.Abandon())
                self._abandoning.add(worker.name)

    def abandoned(self, worker: WorkerProcess) -> None:
        self._abandoning.discard(worker.name)

    def go_on(self) -> None:
        """Back to work once everyone is there and nothing is on its way."""
        passes = self._passes
        if self._workers.not_ready:
            return
        if passes.suspended:
            if self._abandoning or not passes.weights.is_quiet:
                return
            passes.suspended = False
            passes.weights.carry_out(passes.schedule.abandon_pass())
        if self._broken is not None:
            error, self._broken = self._broken, None
            self._retry(error)
        elif not passes.running and passes.begin_at is None:
            self._begin()

    def _retry(self, error: WorkerDied) -> None:
        """The pass again, or one with less in it."""
        passes = self._passes
        ids = [piece.request.id for micro_batch in passes.running for piece in micro_batch.pieces]
        as_it_is, guilty = passes.poison.failed(ids, max(micro_batch.num_rows for micro_batch in passes.running))
        if as_it_is:
            passes.start()
            return
        passes.drop()
        if guilty is not None:
            text = f"{TRIES} times in a row a worker was lost while it computed this request alone, at last: {error}"
            self._requests.set_aside(guilty)
            self._given_up.append((guilty, text))
            if len(self._given_up) >= MOST_GUILTY:
                raise WorkerDied(
                    f"a worker was lost again and again with each of {MOST_GUILTY} requests in a row, so it is not the "
                    f"requests; the last time: {error}",
                    error.details,
                    error.kind,
                )
        self._begin()

    def _begin(self) -> None:
        """The next pass; where there is none to come, nothing more is learnt of those that were set aside."""
        self._passes.begin()
        if not self._passes.running and not self._requests.waits_for_disk:
            self.tell_the_guilty()

    def tell_the_guilty(self) -> None:
        for request_id, text in self._given_up:
            log(f"a request is given up: {text}")
            self._answer(self._requests.fail(request_id, text))
        self._given_up.clear()

"""The worker processes of one engine: started, watched, and started again when one is lost."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from flexgen_lite.engine.event_loop import EventLoop
from flexgen_lite.engine.launch import FreshProcess, Launch
from flexgen_lite.engine.worker_process import WorkerDied, WorkerProcess, stop_all
from flexgen_lite.engine.zygote import ForkedProcess, Zygote, ZygoteLost, shared_zygotes
from flexgen_lite.memory.arena import Arena
from flexgen_lite.memory.park_file import ParkFile
from flexgen_lite.memory.usage import ZYGOTE, MemoryUse
from flexgen_lite.model.files import OFFLINE
from flexgen_lite.wire.doorbells import doorbell_pair
from flexgen_lite.wire.zygote_messages import zygote_pair

COMPUTE, LOADER = "compute worker", "disk loader"
ARENAS = {"compute": ("weights", "exchange", "states"), "loader": ("weights",), "attention": ("kv", "exchange")}
SHARED = "shared"  # the arena of weights that other engines map, too
KV_ON_DISK = ("kv", "states", "parked")  # what the loader is given besides, where there is a file for it
KEPT_PRODUCTS = 128  # a model has some six shapes of weights; a pass has one number of rows, or a few
LEAVE_ZYGOTES = ("compute",)  # the others start in half a second
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "OPENBLAS_NUM_THREADS": "1",  # NumPy's, which starts them when it is imported, and which nothing here has a use for
}
COMPUTE_ENVIRONMENT = {
    # Programs for products that oneDNN keeps, and PyTorch's own list of them: by default 1,024 each.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KEPT_PRODUCTS),
    "LRU_CACHE_CAPACITY": str(KEPT_PRODUCTS),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    # Threads look out for the next operation for some 40 us before they sleep: to be woken takes longer than many of
    # them last. Decoding 64 sequences gains 2 to 8 per cent; more gains nothing.
    "GOMP_SPINCOUNT": "2000",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",  # nothing of the budget is lost between temporaries
}
FAILED_STARTS = 3  # in a row of one worker: the next one ends the engine
IDLE_FAILURES = 3  # in a row of one worker that started well each time, and failed by itself before anything was done
IDLE_LOSSES = 15  # in a row of one worker that started well each time, and was lost before anything was done
FINAL = ("CheckpointError", "UserError")  # failures that the next process would run into as well


class WorkerSupervisor:
    """Args:
    on_message: is given each message of a worker, and the worker.
    on_output: is given a worker's name and a line that it printed.
    on_loss: is given a worker that is gone and why. It calls `start_again`, or raises.
    """

    def __init__(
        self,
        loop: EventLoop,
        context: zmq.Context[zmq.Socket[bytes]],
        run_dir: Path,
        arenas: Mapping[str, Arena | ParkFile],
        memory: MemoryUse,
        on_message: Callable[[WorkerProcess, Any], None],
        on_output: Callable[[str, str], None],
        on_loss: Callable[[WorkerProcess, WorkerDied], None],
    ) -> None:
        self._loop = loop
        self._context = context
        self._run_dir = run_dir
        self._arenas = arenas
        self._memory = memory
        self._on_message = on_message
        self._on_output = on_output
        self._on_loss = on_loss
        self._workers: dict[str, WorkerProcess] = {}
        self._zygotes: dict[str, Zygote] = {}  # by the kind of worker
        # Of each attention worker, with the compute worker.
        self._doorbells: list[tuple[socket.socket, socket.socket]] = []
        self._failed_starts: Counter[str] = Counter()  # in a row, by worker
        self._idle_losses: Counter[str] = Counter()
        self.not_ready: set[str] = set()
        self.restarts = 0

    def start(self, num_attention: int) -> None:
        for kind, zygote in shared_zygotes().items():
            self._use(kind, zygote)
        self._doorbells = [doorbell_pair() for _ in range(num_attention)]
        self._start("compute", COMPUTE, 0)
        self._start("loader", LOADER, 0)
        for index in range(num_attention):
            self._start("attention", f"attention worker {index}", 0)

    @property
    def compute(self) -> WorkerProcess:
        return self._workers[COMPUTE]

    @property
    def loader(self) -> WorkerProcess:
        return self._workers[LOADER]

    def attention(self, index: int) -> WorkerProcess:
        return self._workers[f"attention worker {index}"]

    def __iter__(self) -> Iterator[WorkerProcess]:
        return iter(list(self._workers.values()))

    def is_ready(self, worker: WorkerProcess) -> bool:
        return worker.name not in self.not_ready

    def ready(self, worker: WorkerProcess) -> None:
        """The worker has all that it needs."""
        self.not_ready.discard(worker.name)
        del self._failed_starts[worker.name]

    def did_something(self, worker: WorkerProcess) -> None:
        """What it did would not have to be done again: losses before that do not count any more."""
        del self._idle_losses[worker.name]

    def lose(self, worker: WorkerProcess, error: WorkerDied) -> None:
        """The worker is gone, or has to go. Raises `error` where another process in its place would fare no better."""
        try:
            worker.kill()
        finally:
            self._forget(worker)
        losses, when = self._idle_losses, "with nothing done in between"
        limit = IDLE_FAILURES if error.kind else IDLE_LOSSES
        if worker.name in self.not_ready:
            losses, limit, when = self._failed_starts, FAILED_STARTS, "before it had started"
            if worker.number > 0 and worker.kind in self._zygotes:
                self._give_up(worker.kind)  # it may be what ails the worker
        losses[worker.name] += 1
        if error.user_error or error.kind in FINAL:
            raise error
        if losses[worker.name] > limit:
            text = f"{worker.name} was lost {losses[worker.name]} times in a row {when}; the last time: {error}"
            raise WorkerDied(text, error.details, error.kind)
        if error.kind and worker.number == 0 and worker.name in self.not_ready:
            raise error  # an exception before it was ever ready is no accident
        self._on_loss(worker, error)

    def start_again(self, worker: WorkerProcess) -> WorkerProcess:
        """Another process in its place, with the same arenas and doorbells."""
        self.restarts += 1
        return self._start(worker.kind, worker.name, worker.number + 1)

    def stop(self) -> None:
        """Afterwards no process is left."""
        for worker in self._workers.values():
            self._unwatch(worker)
        stop_all(self._workers.values())
        self._workers.clear()
        for kind in list(self._zygotes):
            self._give_up(kind)
        for pair in self._doorbells:
            for end in pair:
                end.close()

    def _start(self, kind: str, name: str, number: int) -> WorkerProcess:
        of_disk = KV_ON_DISK if kind == "loader" and "parked" in self._arenas else ()
        of_all = (SHARED,) if "weights" in ARENAS[kind] and SHARED in self._arenas else ()
        arenas = {arena: self._arenas[arena].fd for arena in (*ARENAS[kind], *of_all, *of_disk)}
        ends = {COMPUTE: {str(i): pair[0] for i, pair in enumerate(self._doorbells)}}
        ends |= {f"attention worker {i}": {"compute": pair[1]} for i, pair in enumerate(self._doorbells)}
        doorbells = {end: sock.fileno() for end, sock in ends.get(name, {}).items()}
        start = partial(self._start_process, OFFLINE if number > 0 else {})
        worker = WorkerProcess(kind, name, number, self._context, self._run_dir, arenas, doorbells, start)
        self._workers[name] = worker
        self.not_ready.add(name)
        self._memory.watch(worker.pid, name)
        self._loop.watch(worker.socket, partial(self._receive, worker))
        self._loop.watch(worker.output, partial(self._forward_output, worker))
        self._loop.watch(worker.pidfd, partial(self._died, worker))
        return worker

    def _start_process(self, environment: Mapping[str, str], launch: Launch) -> FreshProcess | ForkedProcess:
        """Forked, where a zygote has what the worker imports; else a fresh interpreter, which may leave a zygote."""
        zygote = self._zygotes.get(launch.kind)
        if zygote is not None:
            try:
                process = zygote.fork(launch, environment)
                self._memory.watch(zygote.pid, ZYGOTE)
                return process
            except ZygoteLost:
                self._give_up(launch.kind)
        environment = {**ENVIRONMENT, **environment}
        if launch.kind not in LEAVE_ZYGOTES:
            return FreshProcess(launch, environment)
        ours, theirs = zygote_pair()
        with theirs:
            fresh = FreshProcess(launch, {**COMPUTE_ENVIRONMENT, **environment}, theirs.fileno())
        self._use(launch.kind, Zygote(ours))
        return fresh

    def _use(self, kind: str, zygote: Zygote) -> None:
        self._zygotes[kind] = zygote
        self._loop.watch(zygote.fileno(), partial(self._hear, kind, zygote))

    def _hear(self, kind: str, zygote: Zygote) -> None:
        try:
            zygote.hear()
        except ZygoteLost:
            self._give_up(kind)
        else:
            self._memory.watch(zygote.pid, ZYGOTE)

    def _give_up(self, kind: str) -> None:
        """The next worker of the kind is a fresh process."""
        zygote = self._zygotes.pop(kind)
        self._loop.forget(zygote.fileno())
        if zygote.pid:
            self._memory.forget(zygote.pid)
        zygote.close()

    def _forget(self, worker: WorkerProcess) -> None:
        self._unwatch(worker)
        self._memory.forget(worker.pid)
        del self._workers[worker.name]
        worker.close()

    def _unwatch(self, worker: WorkerProcess) -> None:
        for source in (worker.socket, worker.output, worker.pidfd):
            self._loop.forget(source)

    def _receive(self, worker: WorkerProcess) -> None:
        while self._workers.get(worker.name) is worker and worker.socket.poll(0):
            try:
                message = worker.receive()
            except WorkerDied as error:
                self.lose(worker, error)
                return
            self._on_message(worker, message)

    def _died(self, worker: WorkerProcess) -> None:
        self.lose(worker, worker.death())

    def _forward_output(self, worker: WorkerProcess) -> None:
        data = worker.read_output()
        if data == b"":  # its end: the process's own is told by another descriptor
            self._loop.forget(worker.output)
        for line in (data or b"").decode(errors="replace").splitlines():
            if line.strip():
                self._on_output(worker.name, line)


def overdue(awaited: Iterable[tuple[WorkerProcess, float]], seconds: float) -> list[WorkerProcess]:
    """Those of the workers, with when they were last heard of, that have been silent for `seconds`."""
    now = time.monotonic()
    return list({worker.name: worker for worker, since in awaited if now - since > seconds}.values())

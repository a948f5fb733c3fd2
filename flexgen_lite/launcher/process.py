"""The coordinator as a child process: started, listened to, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.comparison import Prediction
from flexgen_lite.errors import EngineError
from flexgen_lite.launcher.descendants import kill_all, wait_until_gone
from flexgen_lite.plan.engine_parts import num_engines
from flexgen_lite.plan.plan import PlanError
from flexgen_lite.plan.topology import inspect_topology
from flexgen_lite.plan.workload import Workload
from flexgen_lite.wire.engine_share import EngineShare
from flexgen_lite.wire.runtime_dir import RuntimeDir

COMMAND = (sys.executable, "-m", "flexgen_lite.engine")
DISPATCH = (sys.executable, "-m", "flexgen_lite.dispatch")  # of several engines, to whom it gives their orders

_STOP_SECONDS = 10.0
_START_GRACE = 15.0  # the coordinator's own deadline comes first: it knows what it waits for
_KILL_SECONDS = 10.0  # for the system to clear away a process that was killed
_GONE_SECONDS = 60.0  # for its workers' memory to be given back, which may be hundreds of GiB


class EngineProcess:
    """Starts the coordinator and waits until it is ready. Where `config.engines` comes to several, it is the process in
    front of them, which is to others what a coordinator is.

    The coordinator gets one JSON object in one line on its standard input, {"config": ..., "run_dir": ...,
    "expected": ..., "predicted": ..., "calibrate": ..., "share": ...}, and exits when that input ends, so it never
    outlives this process. On its standard output it writes one JSON object a line: events "log", "plan", "ready",
    "calibrated", "engines" and "failed". Its standard error is this process's own.

    Args:
        config: of the engine.
        expected: the work to come, where it is known; memory is shared out accordingly.
        predicted: what is foretold of it, for the trace.
        command: what to start instead of the coordinator.
        on_log: is given each log message, on another thread.
        on_plan: is given the plan, for people, on another thread.
        environment: variables beside this process's own.
        wait: until it is ready; else `wait_until_ready` does.
        calibrate: it serves nobody, but measures and ends; `wait_until_calibrated` has what it found.
        share: its part, where it is one of several engines of the machine; it inherits the arena's descriptor.
        outer: the private directory of this process, where that is the child of an EngineProcess itself: what the
            engine has lies in it, and is ended with this process.

    Raises:
        EngineError: it did not become ready, or there cannot be as many engines.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        expected: Workload | None = None,
        predicted: Prediction | None = None,
        command: Sequence[str] | None = None,
        on_log: Callable[[str], None] | None = None,
        on_plan: Callable[[str], None] | None = None,
        environment: Mapping[str, str] | None = None,
        wait: bool = True,
        calibrate: bool = False,
        outer: Path | None = None,
        share: EngineShare | None = None,
    ) -> None:
        config = config.model_copy(update={"engines": 1}) if calibrate else with_number_of_engines(config)
        run_directory = RuntimeDir(outer)
        own = COMMAND if config.engines == 1 else DISPATCH
        try:
            inherited = () if share is None else (share.arena_fd,)
            child = _spawn(command or own, environment or {}, inherited, own_session=outer is None)
        except OSError as error:
            run_directory.remove()
            raise EngineError(f"the engine cannot be started: {error}") from None
        self._child = child
        # Of several engines the first comes first, and then the others.
        self._ready_within = config.start_timeout * (1 if config.engines == 1 else 2) + _START_GRACE
        self._news = _News(on_log, on_plan)
        self._finalizer = weakref.finalize(self, _stop, child, run_directory, os.getpid())
        reader = threading.Thread(target=self._news.read, args=(child,), name="flexgen-lite engine events", daemon=True)
        reader.start()
        try:
            order = {
                "config": json.loads(config.to_json()),
                "run_dir": str(run_directory.path),
                "expected": None if expected is None else expected.to_dict(),
                "predicted": None if predicted is None else predicted.to_dict(),
                "calibrate": calibrate,
                "share": None if share is None else share.to_dict(),
            }
            _tell(child, order)
            if wait:
                self.wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def wait_until_ready(self) -> None:
        """
        Raises:
            EngineError: it did not become ready; `stop()` it. Also where that is done meanwhile, on another thread.
        """
        self._news.wait_until_ready(self._ready_within)

    def wait_until_calibrated(self, timeout: float) -> dict[str, Any]:
        """
        Raises:
            EngineError: it failed, or took longer.
        """
        return self._news.wait_until_calibrated(timeout)

    @property
    def endpoint(self) -> str:
        """Where clients connect."""
        return self._news.endpoint or ""

    @property
    def plan(self) -> str:
        return self._news.plan

    @property
    def decided(self) -> Mapping[str, Any]:
        """For an engine that is to take its place: "ram", "dtype" and "device" as this one has them, and "files", the
        same as long as the model's files are. For who starts several: "max_sequences", that run at once, and "weights",
        for SharedWeights.from_dict, where it shares any."""
        return self._news.decided

    @property
    def outage(self) -> str | None:
        """Of several engines: why none of them is open, while one is being started again; None while one is."""
        return self._news.outage

    @property
    def restarts(self) -> int:
        """Of several engines: how often one of them was started again."""
        return self._news.restarts

    @property
    def pid(self) -> int:
        return self._child.pid

    def last_words(self, patience: float = 0.0) -> str | None:
        """Wait up to `patience` seconds for the engine to end; what it died of, or None while it lives."""
        return self._news.last_words(patience)

    def end(self, patience: float) -> EngineError | None:
        """Wait up to `patience` seconds for it to end by itself, and kill it then. Afterwards nothing of it is left.

        Returns:
            What it died of; None where it had said nothing and had to be killed.

        Raises:
            EngineError: it cannot be killed.
        """
        has_ended = self._news.wait_for_end(patience)
        failure = self._news.failure
        if not has_ended:
            kill_all(self.pid)
            if not self._news.wait_for_end(_KILL_SECONDS):
                raise EngineError(f"the engine (process {self.pid}) cannot be killed: it waits for the system")
        wait_until_gone(self.pid, _GONE_SECONDS)
        self.stop()
        return failure

    def stop(self) -> None:
        """Let the engine finish in order, kill it if it does not within 10 s. Safe to call twice."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _News:
    """What the child has told so far. Its thread drains the child's output to the end."""

    def __init__(self, on_log: Callable[[str], None] | None, on_plan: Callable[[str], None] | None) -> None:
        self._on_log, self._on_plan = on_log, on_plan
        self._changed = threading.Condition()
        self.endpoint: str | None = None
        self.plan = ""
        self.decided: dict[str, Any] = {}
        self.outage: str | None = None
        self.restarts = 0
        self.calibrated: dict[str, Any] | None = None
        self.failure: EngineError | None = None  # as it told it; once it has ended, in any case
        self._ended = False

    def read(self, child: subprocess.Popen[bytes]) -> None:
        output: IO[bytes] = child.stdout  # type: ignore[assignment]
        with output:
            for line in output:
                self._take_in(line)
        code = _reap(child)
        with self._changed:
            if self.failure is None:
                self.failure = EngineError(f"the engine ended unexpectedly, {_cause(code)}")
            self._ended = True
            self._changed.notify_all()

    def _take_in(self, line: bytes) -> None:
        event = _parse(line)
        kind = event.get("event")
        if kind == "log" and self._on_log is not None:
            self._on_log(str(event.get("message")))
        elif kind == "plan":
            self.plan, self.decided = str(event.get("text")), event.get("decided") or {}
            if self._on_plan is not None:
                self._on_plan(self.plan)
        elif kind == "ready":
            with self._changed:
                self.endpoint = str(event.get("endpoint"))
                self._changed.notify_all()
        elif kind == "engines":
            self.outage, self.restarts = event.get("outage"), int(event.get("restarts") or 0)
        elif kind == "calibrated":
            with self._changed:
                self.calibrated = event
                self._changed.notify_all()
        elif kind == "failed":
            with self._changed:
                self.failure = EngineError(
                    str(event.get("message")),
                    user_error=event.get("user_error") is True,
                    details=str(event.get("details") or ""),
                    comes_again=event.get("comes_again") is True,
                )
                self._changed.notify_all()

    def wait_until_ready(self, timeout: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.endpoint is not None or self.failure is not None, timeout)
            if self.failure is not None:
                raise self.failure
            if self.endpoint is None:
                raise EngineError(f"the engine was not ready within {timeout:g} s: raise start_timeout")

    def wait_until_calibrated(self, timeout: float) -> dict[str, Any]:
        with self._changed:
            self._changed.wait_for(lambda: self.calibrated is not None or self.failure is not None, timeout)
            if self.calibrated is None:
                raise self.failure or EngineError(f"the engine was not calibrated within {timeout:g} s")
            return self.calibrated

    def last_words(self, patience: float) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self.failure is not None, patience)
            return None if self.failure is None else str(self.failure)

    def wait_for_end(self, patience: float) -> bool:
        """Whether its process has ended."""
        with self._changed:
            return self._changed.wait_for(lambda: self._ended, patience)


def with_number_of_engines(config: EngineConfig) -> EngineConfig:
    """What "auto" comes to on this machine. Raises EngineError where there cannot be as many as are asked for."""
    if config.engines == 1:
        return config
    try:
        return config.model_copy(update={"engines": num_engines(config, inspect_topology())})
    except PlanError as error:
        raise EngineError(str(error), user_error=True) from None


def _spawn(
    command: Sequence[str], environment: Mapping[str, str], inherited: Sequence[int] = (), own_session: bool = True
) -> subprocess.Popen[bytes]:
    """In a session of its own, or in a group of its own of this one. `inherited`: descriptors that the child has under
    the same numbers."""
    return subprocess.Popen(
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=own_session,
        process_group=None if own_session else 0,
        pass_fds=inherited,
        env={**os.environ, **environment},
    )


def _tell(child: subprocess.Popen[bytes], order: dict[str, Any]) -> None:
    """Write the order and leave the pipe open: its end is the child's sign to exit."""
    stdin: IO[bytes] = child.stdin  # type: ignore[assignment]
    with contextlib.suppress(BrokenPipeError):  # it died at once: its output tells why
        stdin.write(json.dumps(order).encode() + b"\n")
        stdin.flush()


def _parse(line: bytes) -> dict[str, Any]:
    """An event; a line that is none (a library's print) is passed on to standard error."""
    with contextlib.suppress(ValueError):
        event = json.loads(line)
        if isinstance(event, dict):
            return event
    sys.stderr.write(line.decode(errors="replace"))
    return {}


def _reap(child: subprocess.Popen[bytes]) -> int:
    """Wait for its end; its exit code. Workers that it could not stop any more are killed, before its number, which is
    that of their group, is given up."""
    with contextlib.suppress(ChildProcessError):  # another thread has waited for it
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        kill_all(child.pid)
    return child.wait()


def _cause(code: int) -> str:
    if code == 0:
        return "told to stop by another process"
    if code > 0:
        return f"with exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _stop(child: subprocess.Popen[bytes], run_directory: RuntimeDir, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the process that started it
        return
    try:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                kill_all(child.pid)  # its workers too
        child.wait()
        if child.stdin is not None:
            with contextlib.suppress(OSError):
                child.stdin.close()
    finally:
        run_directory.remove()

"""The engines of the machine as child processes: the first one first, then the others at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.dispatch.engine_config import config_of, work_of
from flexgen_lite.engine.kv_setup import kv_disk_folder
from flexgen_lite.errors import EngineError
from flexgen_lite.launcher.supervisor import EngineSupervisor
from flexgen_lite.memory.arena import Arena
from flexgen_lite.plan.engine_parts import EnginePart
from flexgen_lite.plan.workload import Workload
from flexgen_lite.wire.engine_share import EngineShare, SharedWeights


class Engines:
    """Args:
    config: of all of them.
    parts: what each has of the machine.
    ram: bytes of main memory for all of them, the weights that they share among these.
    run_dir: private, in which each has a directory of its own.
    expected: the work to come for all of them, where it is known.
    on_log: is given each log message, on any thread.
    on_change: is called on some thread when `supervisors` or `failure` is there.

    Attributes:
        supervisors: of the engines, once all are ready.
        failure: why they are not.
    """

    def __init__(
        self,
        config: EngineConfig,
        parts: list[EnginePart],
        ram: int,
        run_dir: Path,
        expected: Workload | None,
        on_log: Callable[[str], None],
        on_change: Callable[[], None],
    ) -> None:
        self.supervisors: list[EngineSupervisor] = []
        self.failure: Exception | None = None
        self._config, self._parts, self._ram = config, parts, ram
        self._run_dir, self._expected = run_dir, work_of(expected, len(parts))
        self._on_log, self._on_change = on_log, on_change
        self._arena = Arena("shared")  # of weights: the first engine fills it
        self._started: dict[int, EngineSupervisor] = {}
        self._closing = threading.Event()

    def start(self) -> None:
        """On threads of their own."""
        threading.Thread(target=self._start_all, name="flexgen-lite engines", daemon=True).start()

    def stop(self) -> None:
        """All at the same time, each in order. One that is not ready yet ends with this process."""
        self._closing.set()
        stopping = [
            threading.Thread(target=engine.stop, name=f"flexgen-lite stop {number}", daemon=True)
            for number, engine in list(self._started.items())
        ]
        for thread in stopping:
            thread.start()
        for thread in stopping:
            thread.join()
        self._arena.close()

    def _start_all(self) -> None:
        first, *others = self._parts
        self._start(first, {})
        if self.failure is None and not self._closing.is_set():
            decided = self._started[0].decided
            threads = [threading.Thread(target=self._start, args=(part, decided), daemon=True) for part in others]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self.failure is None:
            self.supervisors = [self._started[part.number] for part in self._parts]
        self._on_change()

    def _start(self, part: EnginePart, decided: Mapping[str, Any]) -> None:
        """`decided`: by the first engine."""
        name = f"engine {part.number}"
        folder = kv_disk_folder(self._config)
        config = config_of(self._config, part, len(self._parts), folder, decided.get("dtype", ""))
        weights = decided.get("weights")
        share = EngineShare(
            part.number,
            len(self._parts),
            part.cpus,
            self._ram,
            self._arena.fd,
            None if weights is None else SharedWeights.from_dict(weights),
        )
        try:
            self._started[part.number] = EngineSupervisor(
                config,
                expected=self._expected,
                on_log=lambda text: self._on_log(_said_by(name, text)),
                outer=self._run_dir,
                share=share,
            )
        except EngineError as error:
            self.failure = self.failure or EngineError(
                f"{name}: {error}", user_error=error.user_error, details=error.details, comes_again=error.comes_again
            )
        except Exception as error:
            self.failure = self.failure or error


def _said_by(name: str, text: str) -> str:
    warning = "warning: "
    return f"{warning}{name}: {text.removeprefix(warning)}" if text.startswith(warning) else f"{name}: {text}"

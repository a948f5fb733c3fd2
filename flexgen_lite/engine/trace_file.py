"""A trace of what each process did when, in Chrome's trace event format, which Perfetto opens.

Written as it happens, one event a line, so that it takes no memory; a file that a crash has cut off can still be read.
A disk that is full ends the trace, not the run.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

ABOUT = "flexgen-lite"
COORDINATOR = "coordinator"
TRAFFIC = "traffic, bytes"


class TraceFile:
    """
    Args:
        path: the file; what is there is overwritten.
        warn: is told once if the trace cannot be gone on with.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = lambda _: None) -> None:
        self._path, self._warn = path, warn
        self._file: TextIO | None = path.open("w", encoding="utf-8")
        self._processes: dict[str, int] = {}
        self._tracks: dict[tuple[str, str], int] = {}
        self._write('{"displayTimeUnit": "ms", "traceEvents": [')
        self._is_first = True
        self._process(COORDINATOR)

    def about(self, values: Mapping[str, object]) -> None:
        """What is traced: model, plan and the like."""
        self._event({"name": ABOUT, "ph": "M", "pid": self._process(COORDINATOR), "tid": 0, "args": dict(values)})
        self.flush()

    def span(self, process: str, track: str, name: str, start_ns: int, end_ns: int) -> None:
        """A piece of work; `track` is its row among those of its process, where pieces come in order."""
        times = {"ts": start_ns / 1000, "dur": (end_ns - start_ns) / 1000}
        self._event(
            {"name": name, "ph": "X", "pid": self._process(process), "tid": self._track(process, track), **times}
        )

    def instant(self, process: str, name: str, time_ns: int) -> None:
        """Something that happened to a process."""
        place = {"pid": self._process(process), "tid": 0, "s": "p"}
        self._event({"name": name, "ph": "i", **place, "ts": time_ns / 1000})

    def counter(self, name: str, time_ns: int, values: Mapping[str, float]) -> None:
        """Numbers as they are from now on."""
        place = {"pid": self._process(COORDINATOR), "tid": 0}
        self._event({"name": name, "ph": "C", **place, "ts": time_ns / 1000, "args": dict(values)})

    def flush(self) -> None:
        """What was written is in the file, whatever becomes of this process."""
        self._try(lambda file: file.flush())

    def close(self) -> None:
        self._write("\n]}\n")
        self._try(lambda file: file.close())
        self._file = None

    def _process(self, name: str) -> int:
        if name not in self._processes:
            pid = self._processes[name] = len(self._processes) + 1
            self._event({"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}})
            self._event({"name": "process_sort_index", "ph": "M", "pid": pid, "tid": 0, "args": {"sort_index": pid}})
        return self._processes[name]

    def _track(self, process: str, name: str) -> int:
        """Numbers of tracks differ in all processes."""
        if (process, name) not in self._tracks:
            tid = self._tracks[process, name] = len(self._tracks) + 1
            place = {"pid": self._process(process), "tid": tid}
            self._event({"name": "thread_name", "ph": "M", **place, "args": {"name": name}})
        return self._tracks[process, name]

    def _event(self, event: Mapping[str, object]) -> None:
        self._write(("\n" if self._is_first else ",\n") + json.dumps(event, ensure_ascii=False))
        self._is_first = False

    def _write(self, text: str) -> None:
        self._try(lambda file: file.write(text))

    def _try(self, action: Callable[[TextIO], object]) -> None:
        if self._file is None:
            return
        try:
            action(self._file)
        except OSError as error:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # it tries to write what is left
                file.close()
            self._warn(f"the trace {self._path} ends here: {error.strerror}")

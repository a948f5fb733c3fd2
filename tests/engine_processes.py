"""The processes of a running engine."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from flexgen_lite.engine.zygote import SHARED
from tests.coordinators import COORDINATOR


def workers_of(coordinator: int) -> dict[str, psutil.Process]:
    """By the names that the engine gives them; those that live."""
    found = {}
    for child in psutil.Process(coordinator).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = child.cmdline()
            if "--name" in line and child.name() != "zygote" and child.status() != psutil.STATUS_ZOMBIE:
                found[line[line.index("--name") + 1]] = child
    for path in Path(os.environ.get(SHARED, "/nonexistent")).glob(f"{coordinator}-*"):  # forked by the tests' zygotes
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(path.name.rpartition("-")[2]))
            if process.status() != psutil.STATUS_ZOMBIE:
                found[path.read_text()] = process
    return found


def own_children() -> list[psutil.Process]:
    """Of this process, with theirs, that live; but for those that fork processes for all tests."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            line = " ".join(child.cmdline())
            forks = "tests.zygotes" in line or "multiprocessing" in line
            forks |= "tests.coordinators" in line and child.name() != COORDINATOR
            found += [child] * (not forks and child.status() != psutil.STATUS_ZOMBIE)
    return found


def survivors(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that have not ended within that time. What has ended and waits for whoever adopted it to ask, has ended."""
    alive, deadline = list(processes), time.monotonic() + seconds
    while (alive := [process for process in alive if _is_running(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def zygote_of(coordinator: int) -> psutil.Process:
    children = psutil.Process(coordinator).children(recursive=True)
    (found,) = [child for child in children if child.name() == "zygote" and child.status() != psutil.STATUS_ZOMBIE]
    return found

"""Kernels from numba's cache on disk. What it lacks is compiled by a child process: a compiler's memory, some 65 MiB
that do not come back, goes with the child and is not the worker's for life.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from numba.core import event

_PR_SET_PDEATHSIG = 1
_T = TypeVar("_T")


class _NotCachedError(BaseException):
    """Leaves numba before it compiles: not an Exception, which numba would take for an error of the kernel."""


class _Refusal(event.Listener):
    """Raises where this thread is about to compile."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()

    def on_start(self, event: event.Event) -> None:
        if threading.get_ident() == self._thread:
            raise _NotCachedError

    def on_end(self, event: event.Event) -> None:
        pass


def from_cache(load: Callable[[], _T]) -> _T:
    """What `load` returns, which gets kernels ready that are compiled with `cache=True`.

    Where a kernel is not in the cache, a child calls `load` first. Where the cache cannot be written, the kernels are
    compiled here.
    """
    with contextlib.suppress(_NotCachedError), _refusing_to_compile():
        return load()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _compile(load, parent)
    with contextlib.suppress(ChildProcessError):  # where the system reaps by itself, it has ended as well
        os.waitpid(child, 0)
    return load()


@contextlib.contextmanager
def _refusing_to_compile() -> Iterator[None]:
    listener = _Refusal()
    event.register("numba:run_pass", listener)
    try:
        yield
    finally:
        event.unregister("numba:run_pass", listener)


def _compile(load: Callable[[], object], parent: int) -> None:
    """In the child: ends it. What goes wrong here goes wrong in the parent too, which tells of it."""
    with contextlib.suppress(BaseException):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            load()
    os._exit(0)

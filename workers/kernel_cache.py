"""Kernels from numba's cache on disk. What it lacks is compiled by a child process: a compiler's memory, some 65 MiB
that do not come back, goes with the child and is not the worker's for life.

By itself numba looks whether the file of a compiled function has changed, and not those that it calls: after an upgrade
it would go on with old code. `watch_sources`, called before anything is taken from the cache, has it look at all of
them.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba.core import caching, event

_PR_SET_PDEATHSIG = 1
_T = TypeVar("_T")
_FOLDER = Path(__file__).resolve().parent
_Locator: Any = caching._SourceFileBackedLocatorMixin
_stamp_of_file = _Locator.get_source_stamp


def watch_sources() -> None:
    """Has what numba knows a function's source by change with any file of kernels here."""
    _Locator.get_source_stamp = _stamp_with_sources


def _stamp_with_sources(locator: Any) -> Any:
    stamp = _stamp_of_file(locator)
    is_ours = _FOLDER in Path(locator._py_file).resolve().parents
    return (stamp, _digest_of_sources()) if is_ours else stamp


@cache
def _digest_of_sources() -> str:
    """Of all files that kernels are made of."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(_FOLDER.rglob("*.py")):
        content = path.read_bytes()
        if b"numba" in content or b"simd" in content:
            digest.update(content)
    return digest.hexdigest()


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
    watch_sources()
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

"""Kernels from numba's cache on disk. What it lacks is compiled by a child process: a compiler's memory, some 65 MiB
that do not come back, goes with the child and is not the worker's for life. Of several workers that lack the same
kernels, as all do at their first start, one compiles and the others wait.

By itself numba looks whether the file of a compiled function has changed, and not those that it calls: after an upgrade
it would go on with old code. And two processes that save kernels of one name at once may take the same file. `guard`,
called before anything is taken from the cache, mends both.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba.core import caching, event

from flexgen_lite.model import packing

_PR_SET_PDEATHSIG = 1
_T = TypeVar("_T")
_FOLDER = Path(__file__).resolve().parent
_Locator: Any = caching._SourceFileBackedLocatorMixin
_Files: Any = caching.IndexDataCacheFile
_stamp_of_file, _load = _Locator.get_source_stamp, _Files.load


@cache
def guard() -> None:
    """Has what numba knows a function's source by change with any file of kernels here, as they are now: code that is
    imported later is not to be kept under the name of what it was replaced by. Kernels are read and written one by one.
    """
    sources = _digest_of_sources()

    def stamp(locator: Any) -> Any:
        stamp = _stamp_of_file(locator)
        is_ours = _FOLDER in Path(locator._py_file).resolve().parents
        return (stamp, sources) if is_ours else stamp

    _Locator.get_source_stamp = stamp
    _Files.load, _Files.save = _load_alone, _save_alone


def _digest_of_sources() -> str:
    """Of all files that kernels are made of."""
    digest = hashlib.blake2b(digest_size=16)
    for path in (*sorted(_FOLDER.rglob("*.py")), Path(packing.__file__)):
        content = path.read_bytes()
        if b"numba" in content or b"simd" in content or path.name == "packing.py":
            digest.update(content)
    return digest.hexdigest()


def _load_alone(files: Any, key: Any) -> Any:
    with _locked(files._cache_path, os.O_DIRECTORY):
        return _load(files, key)


def _save_alone(files: Any, key: Any, data: Any) -> None:
    """The index comes last: one that is read names no file of before."""
    with _locked(files._cache_path, os.O_DIRECTORY):
        known = files._load_index()
        numbers = (number for number in range(1, len(known) + 2) if files._data_name(number) not in known.values())
        name = known.get(key) or files._data_name(next(numbers))
        files._save_data(name, data)
        files._save_index({**known, key: name})


@contextlib.contextmanager
def _locked(path: str | Path, flags: int) -> Iterator[None]:
    """Holds a lock, which ends with the process and its children; without one where there can be none."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            file = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            stack.callback(os.close, file)
            fcntl.flock(file, fcntl.LOCK_EX)
            stack.callback(fcntl.flock, file, fcntl.LOCK_UN)  # for a child that another thread has begun meanwhile
        yield


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


def from_cache(load: Callable[[], _T], name: str) -> _T:
    """What `load` returns, which gets kernels ready that are compiled with `cache=True`.

    Where a kernel is not in the cache, a child calls `load` first. Where the cache cannot be written, the kernels are
    compiled here.

    Args:
        name: of the kernels; who asks for others of this name meanwhile has to wait.
    """
    guard()
    with contextlib.suppress(_NotCachedError), _refusing_to_compile():
        return load()
    lock = Path(tempfile.gettempdir(), f"flexgen-lite-{os.getuid()}-compiles-{name}")
    with _locked(lock, os.O_RDWR | os.O_CREAT):
        with contextlib.suppress(_NotCachedError), _refusing_to_compile():
            return load()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            _compile(load, parent)
        with contextlib.suppress(ChildProcessError):  # where the system reaps by itself, it has ended as well
            os.waitpid(child, 0)
        lock.unlink(missing_ok=True)  # who waits for it finds the kernels in the cache
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

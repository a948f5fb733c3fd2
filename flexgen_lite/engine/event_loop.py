"""Waits for sockets and descriptors, and calls what is to be done when one of them is readable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq


class EventLoop:
    """Not for several threads. Callbacks may watch and forget sources."""

    def __init__(self) -> None:
        self._poller = zmq.Poller()
        self._callbacks: dict[Any, Callable[[], None]] = {}
        self._forgot = False

    def watch(self, source: Any, callback: Callable[[], None]) -> None:
        self._poller.register(source, zmq.POLLIN)
        self._callbacks[source] = callback

    def forget(self, source: Any) -> None:
        """To be called before the source is closed; nothing happens where it is not watched."""
        if self._callbacks.pop(source, None) is not None:
            self._poller.unregister(source)
            self._forgot = True

    def step(self, timeout_ms: int | None) -> None:
        """Waits until something is readable, at most `timeout_ms`, and calls what is to be called."""
        self._forgot = False
        for source, _ in self._poller.poll(timeout_ms):
            if source in self._callbacks:
                self._callbacks[source]()
            if self._forgot:  # a new source may have the number of one that is gone: ask again who is readable
                return

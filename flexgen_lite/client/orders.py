"""What the threads of a client want of the engine besides answers: cancellations, and its status."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

from flexgen_lite.errors import EngineError, fresh
from flexgen_lite.wire.client_messages import Cancel, GetStatus, Status


class ClientOrders:
    """Left here by any thread, and taken by the one that has the socket. An engine answers each GetStatus in turn."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._orders: deque[Cancel | GetStatus] = deque()
        self._waiters: deque[Future[Status] | None] = deque()  # one for each GetStatus that is not answered

    def cancel(self, job_id: str) -> None:
        with self._lock:
            self._orders.append(Cancel(job_id))

    def ask_status(self, waiter: Future[Status] | None = None) -> None:
        """`waiter`: is given the answer; None where it matters only that there is one."""
        with self._lock:
            self._orders.append(GetStatus())
            self._waiters.append(waiter)

    def take(self) -> list[Cancel | GetStatus]:
        """Those that are to be sent now, in order."""
        with self._lock:
            orders = list(self._orders)
            self._orders.clear()
            return orders

    def answer(self, status: Status) -> None:
        with self._lock:
            waiter = self._waiters.popleft() if self._waiters else None
        if waiter is not None:
            waiter.set_result(status)

    def engine_lost(self) -> None:
        """Who waits for a status gets the next engine's."""
        with self._lock:
            self._waiters = deque(waiter for waiter in self._waiters if waiter is not None)
            cancels = [order for order in self._orders if isinstance(order, Cancel)]
            self._orders = deque([*cancels, *[GetStatus()] * len(self._waiters)])

    def fail(self, error: EngineError) -> None:
        """Nothing is answered any more."""
        with self._lock:
            waiters, self._waiters = list(self._waiters), deque()
        for waiter in waiters:
            if waiter is not None:
                waiter.set_exception(fresh(error))

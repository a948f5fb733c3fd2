"""What the threads of a client want of the engine besides answers: cancellations, its status, and to know that it has
heard."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future

from flexgen_lite.errors import EngineError, fresh
from flexgen_lite.wire.client_messages import Cancel, GetStatus, Status


class ClientOrders:
    """Left here by any thread, and taken by the one that has the socket. An engine does what it is told in order, and
    answers each GetStatus in turn: so what it was told before one is done when that is answered."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._orders: deque[Cancel | GetStatus] = deque()
        # One for each GetStatus that is not answered.
        self._waiters: deque[Future[Status] | _Heard | None] = deque()

    def cancel(self, job_id: str, heard: bool = False) -> Future[None] | None:
        """With `heard`: it is done when the engine has heard it, or is gone."""
        with self._lock:
            self._orders.append(Cancel(job_id))
            return self._ask_whether_heard() if heard else None

    def ask_whether_heard(self) -> Future[None]:
        """It is done when the engine has heard all that it was told by now, or is gone."""
        with self._lock:
            return self._ask_whether_heard()

    def _ask_whether_heard(self) -> Future[None]:
        self._orders.append(GetStatus())
        self._waiters.append(heard := _Heard())
        return heard

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
        if isinstance(waiter, _Heard):
            waiter.set_result(None)
        elif waiter is not None:
            waiter.set_result(status)

    def engine_lost(self) -> None:
        """Who waits for a status gets the next engine's."""
        with self._lock:
            gone = [waiter for waiter in self._waiters if isinstance(waiter, _Heard)]
            self._waiters = deque(w for w in self._waiters if w is not None and not isinstance(w, _Heard))
            cancels = [order for order in self._orders if isinstance(order, Cancel)]
            self._orders = deque([*cancels, *[GetStatus()] * len(self._waiters)])
        for waiter in gone:
            waiter.set_result(None)

    def fail(self, error: EngineError) -> None:
        """Nothing is answered any more."""
        with self._lock:
            waiters, self._waiters = list(self._waiters), deque()
        for waiter in waiters:
            if isinstance(waiter, _Heard):
                waiter.set_result(None)
            elif waiter is not None:
                waiter.set_exception(fresh(error))


class _Heard(Future[None]):
    pass

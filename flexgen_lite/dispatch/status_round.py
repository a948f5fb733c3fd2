"""When engines are asked what they do, and what clients who ask are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flexgen_lite.dispatch.engine_link import EngineLink
from flexgen_lite.dispatch.open_requests import OpenRequests
from flexgen_lite.dispatch.status_of_all import status_of_all
from flexgen_lite.memory.usage import resident_bytes
from flexgen_lite.wire.client_messages import Status

AT_WORK_SECONDS = 0.5  # between two rounds of questions, while something is to be done
UNEVEN_SECONDS = 0.1  # while an engine has nothing to do and others may have too much
PATIENCE_SECONDS = 1.0  # for an engine's answer: then clients are told what is known of it


class StatusRound:
    """A client that asks is told when all engines have answered a question that was asked after its own.

    Args:
        budget: of main memory, of which `planned` bytes are for this process.
        tell: gives a client its answer.
    """

    def __init__(
        self, requests: OpenRequests, count: int, budget: int, planned: int, tell: Callable[[bytes, Status], None]
    ) -> None:
        self._requests, self._count, self._budget, self._planned = requests, count, budget, planned
        self._tell = tell
        self._own_peak = self._peak = 0
        self._asking: list[bytes] = []  # clients that wait for the next round
        self._waiting: list[bytes] = []  # and those that wait for this one
        self._begun_at: float | None = None  # of this round
        self._ended_at = 0.0  # the last one

    def ask(self, client: bytes) -> None:
        self._asking.append(client)

    def next_at(self, now: float, links: Sequence[EngineLink]) -> float | None:
        """When something is to be done, whatever comes; None: never."""
        if self._begun_at is not None:
            return self._begun_at + PATIENCE_SECONDS
        if self._asking:
            return now
        if not (self._requests.num_sent or any(link.is_asked for link in links)):
            return None
        return self._ended_at + (UNEVEN_SECONDS if self._requests.is_uneven else AT_WORK_SECONDS)

    def go_on(self, now: float, links: Sequence[EngineLink]) -> None:
        """End the round where that is due, and begin the next."""
        if self._begun_at is not None:
            if now < self._begun_at + PATIENCE_SECONDS and any(link.is_asked for link in links):
                return
            self._end(now, links)
        at = self.next_at(now, links)
        if at is not None and now >= at:
            self._begun_at = now
            self._waiting, self._asking = self._asking, []
            for link in links:
                link.ask_status()
            if not any(link.is_asked for link in links):
                self._end(now, links)

    def _end(self, now: float, links: Sequence[EngineLink]) -> None:
        self._begun_at, self._ended_at = None, now
        status = self._status(links)
        waiting, self._waiting = self._waiting, []
        for client in waiting:
            self._tell(client, status)

    def _status(self, links: Sequence[EngineLink]) -> Status:
        used = sum(resident_bytes())
        self._own_peak = max(self._own_peak, used)
        own = {"planned": self._planned, "used": used, "peak": self._own_peak}
        statuses = {link.number: link.status for link in links if link.status is not None}
        requests = self._requests
        totals = {**requests.totals, "engine_restarts": sum(link.restarts for link in links)}
        status = status_of_all(statuses, self._count, requests.num_waiting, totals, own, self._budget)
        self._peak = max(self._peak, status.memory["used"])
        status.memory["peak"] = self._peak
        return status

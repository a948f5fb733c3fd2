"""What a client asks of the owner of its engine, who starts another one when that is lost."""

from __future__ import annotations

from typing import Protocol

from flexgen_lite.errors import EngineError


class EngineLost(EngineError):
    """The engine is gone, or is given up; another one could take its place.

    Attributes:
        patience: seconds that it may still take to end by itself.
    """

    def __init__(self, message: str, patience: float) -> None:
        super().__init__(message)
        self.patience = patience


class EngineOwner(Protocol):
    """One client's; its thread may be any."""

    def last_words(self, patience: float) -> str | None:
        """Wait up to so many seconds for the client's engine to end: what it died of, or None while it lives."""

    def lost(self, error: EngineLost) -> None:
        """The client has given its engine up. Returns at once."""

    def endpoint(self, patience: float | None) -> str | None:
        """Of the engine that follows the client's, which is the client's from now on; None where it is not there within
        so many seconds.

        Raises:
            EngineError: none follows.
        """

    @property
    def restarts(self) -> int:
        """How often the engine was started again since the client has known it; starts that failed are counted too."""

    @property
    def outage(self) -> str | None:
        """Why none of the engines behind one queue is open, while the queue is there; None while one is."""

    def has_finished_one(self) -> None:
        """The engine has answered a request."""

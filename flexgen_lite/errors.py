"""The errors that reach a user besides ConfigError."""

from __future__ import annotations


class EngineError(RuntimeError):
    """The engine could not be started, or is gone; the message is the engine's own where it left one.

    Attributes:
        user_error: the message says it all and the user can act on it.
        details: a traceback for a log, or "".
    """

    def __init__(self, message: str, *, user_error: bool = False, details: str = "") -> None:
        super().__init__(message)
        self.user_error = user_error
        self.details = details


class NoStatus(EngineError):
    """The engine has not told its status in time. It may be busy: whether it is there at all is found out otherwise."""

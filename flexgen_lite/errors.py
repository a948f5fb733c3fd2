"""The errors that reach a user besides ConfigError."""

from __future__ import annotations

from flexgen_lite.text.shown import shown_path


class EngineError(RuntimeError):
    """The engine could not be started, or is gone; the message is the engine's own where it left one.

    Attributes:
        user_error: the message says it all and the user can act on it.
        details: a traceback for a log, or "".
        comes_again: another engine would end with it as well.
    """

    def __init__(self, message: str, *, user_error: bool = False, details: str = "", comes_again: bool = False) -> None:
        super().__init__(message)
        self.user_error = user_error
        self.details = details
        self.comes_again = comes_again or user_error


class NoStatus(EngineError):
    """The engine has not told its status in time. It may be busy: whether it is there at all is found out otherwise."""


def fresh(error: Exception) -> Exception:
    """EngineErrors reach many readers: each gets its own, for an exception carries the traceback of one."""
    if isinstance(error, EngineError):
        return EngineError(str(error), user_error=error.user_error, details=error.details)
    return error


def describe(error: Exception) -> tuple[str, int]:
    """What a command says of an error, and its exit code: 2 for the user's errors, 1 for the engine's."""
    if isinstance(error, EngineError):
        return str(error), 2 if error.user_error else 1
    if isinstance(error, OSError) and error.strerror:
        where = f"{shown_path(error.filename)}: " if error.filename else ""
        return f"{where}{error.strerror}", 2
    if isinstance(error, (ValueError, OSError)):
        return str(error), 2
    return f"internal failure, {type(error).__name__}: {error}", 1

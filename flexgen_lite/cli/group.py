"""Commands whose errors end in one sentence."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup


class Group(TyperGroup):
    """Commands whose errors end in one sentence and an exit code: 2 for the user's, 1 for the engine's."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        try:
            return super().make_context(*args, **options)
        except Exception as error:
            raise _shortened(error) from None

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as interrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(interrupt.args[0] if interrupt.args else 130) from None
        except Exception as error:
            if hasattr(error, "format_message"):  # a usage error, which typer reports itself
                raise _shortened(error) from None
            raise typer.Exit(_report(error)) from None


def _shortened(error: Exception) -> Exception:
    """A usage error that repeats no more of an argument than its beginning and its end."""
    from flexgen_lite.text.shown import shown_path

    for name in ("message", "option_name"):
        if isinstance(getattr(error, name, None), str):
            setattr(error, name, shown_path(getattr(error, name)))
    return error


def _report(error: Exception) -> int:
    """Print one sentence; the exit code."""
    import logging
    import os
    import sys

    from flexgen_lite.errors import describe

    logging.getLogger("flexgen_lite").debug("the command failed", exc_info=error)
    if isinstance(error, BrokenPipeError):  # whoever read the output has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    message, code = describe(error)
    typer.echo(f"error: {message}", err=True)
    return code

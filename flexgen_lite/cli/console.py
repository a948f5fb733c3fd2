"""How a command speaks: a live view on a terminal, lines of text elsewhere, JSON for programs, or hardly at all."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Self, TextIO

from flexgen_lite.cli.rates import Window, seconds_left
from flexgen_lite.wire.client_messages import Status

LINE_SECONDS = 10.0
LIVE_SECONDS = 0.5


class Console:
    """Lines of text: what is asked for on standard output, what happens on standard error.

    Attributes:
        interval: seconds between two calls of `progress`.
        standard_output: where results of the command go.
    """

    interval = LINE_SECONDS

    def __init__(self) -> None:
        self.standard_output: TextIO = sys.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def log(self, text: str) -> None:
        """Something that happened."""
        print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        self.log(f"warning: {text}")

    def plan(self, text: str) -> None:
        """What is placed where."""
        self.log(text)

    def ready(self, endpoint: str) -> None:
        """The engine of `launch` takes requests."""
        self.say(f"endpoint: {endpoint}")

    def say(self, text: str) -> None:
        """What the command is there for."""
        print(text, file=self.standard_output, flush=True)

    def progress(self, text: str, values: dict[str, Any], status: Status) -> None:
        """How far it is: in a line, in numbers, and what the engine does."""
        self.log(text)

    def share(self, text: str, values: dict[str, Any]) -> None:
        """How far a command without an engine is."""
        self.log(text)

    def done(self, text: str, values: dict[str, Any]) -> None:
        self.say(text)


class QuietConsole(Console):
    """Warnings, and nothing else; errors are told elsewhere."""

    def log(self, text: str) -> None:
        if text.startswith("warning: "):
            super().log(text)

    def say(self, text: str) -> None: ...

    def ready(self, endpoint: str) -> None:
        print(f"endpoint: {endpoint}", flush=True)  # or nobody could use it


class JsonConsole(Console):
    """One JSON object a line on standard output; "event" says what each is."""

    def log(self, text: str) -> None:
        if text.startswith("warning: "):
            self._tell("warning", message=text.removeprefix("warning: "))
        else:
            self._tell("log", message=text)

    def plan(self, text: str) -> None:
        self._tell("plan", text=text)

    def ready(self, endpoint: str) -> None:
        self._tell("ready", endpoint=endpoint)

    def say(self, text: str) -> None:
        self._tell("log", message=text)

    def progress(self, text: str, values: dict[str, Any], status: Status) -> None:
        self._tell("progress", **values, status=asdict(status))

    def share(self, text: str, values: dict[str, Any]) -> None:
        self._tell("progress", **values)

    def done(self, text: str, values: dict[str, Any]) -> None:
        self._tell("done", **values)

    def error(self, message: str, exit_code: int) -> None:
        self._tell("error", message=message, exit_code=exit_code)

    def _tell(self, event: str, **values: Any) -> None:
        self.standard_output.write(json.dumps({"event": event, **values}) + "\n")  # at once: several threads tell
        self.standard_output.flush()


class LiveConsole(Console):
    """A view that is kept up to date on standard error; lines scroll by above it."""

    interval = LIVE_SECONDS

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._console = RichConsole(stderr=True)
        self._live = Live(
            console=self._console, auto_refresh=False, redirect_stdout=sys.stdout.isatty(), redirect_stderr=True
        )
        self._begun = 0.0
        self._first: dict[str, float] | None = None  # counters when the work began
        self._window = Window()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()  # shows the cursor again

    def log(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, text: str, values: dict[str, Any], status: Status) -> None:
        from flexgen_lite.cli.live_view import BatchView, EngineView, render

        now = time.monotonic()
        counters = {
            "generated": status.totals.get("generated_tokens", 0.0),
            "prompt": status.totals.get("prompt_tokens", 0.0),
            "busy": status.totals.get("busy_seconds", 0.0),
            "done": float(values.get("done", 0) - values.get("earlier", 0)),
        }
        if self._first is None:
            self._begun, self._first = now, counters
        self._window.add(now, counters)
        busy = counters["busy"] - self._first["busy"]
        overall = [(counters[name] - self._first[name]) / busy if busy > 0 else 0.0 for name in ("generated", "prompt")]
        engine = EngineView(
            status, (self._window.rate("generated"), self._window.rate("prompt")), (overall[0], overall[1])
        )
        batch = None
        if "done" in values:
            elapsed, total = now - self._begun, values["total"]
            new = None if total is None else total - values["earlier"]
            left = values.get("seconds_left")  # by a prediction
            if left is None:
                left = seconds_left(counters["done"], new, elapsed, self._window.rate("done"))
            batch = BatchView(values["done"], values["failed"], total, elapsed, left, values.get("predicted_seconds"))
        self._show(render(engine, batch))

    def share(self, text: str, values: dict[str, Any]) -> None:
        self._show(text)

    def _show(self, view: Any) -> None:
        if not self._live.is_started:
            self._live.start()
        self._live.update(view, refresh=True)


def make_console(quiet: bool, as_json: bool) -> Console:
    """
    Raises:
        ValueError: both are wanted.
    """
    if quiet and as_json:
        raise ValueError("--quiet and --json exclude each other: give one of them")
    if as_json:
        return JsonConsole()
    if quiet:
        return QuietConsole()
    return LiveConsole() if is_terminal() else Console()


def is_terminal() -> bool:
    """Whether standard error is a terminal that a view can be kept up to date on."""
    if not sys.stderr.isatty():
        return False
    from rich.console import Console as RichConsole

    return not RichConsole(stderr=True).is_dumb_terminal


@contextlib.contextmanager
def errors_told(console: Console) -> Iterator[None]:
    """In JSON mode an error is an event too; its exit code is the same."""
    try:
        yield
    except Exception as error:
        if not isinstance(console, JsonConsole):
            raise
        import typer

        from flexgen_lite.errors import describe

        message, code = describe(error)
        console.error(message, code)
        raise typer.Exit(code) from None

"""What a terminal shows of a running engine, and of a batch on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from flexgen_lite.cli.rates import clock
from flexgen_lite.engine.lanes import LANES
from flexgen_lite.text.sizes import format_size
from flexgen_lite.wire.client_messages import Status

COLORS = {
    "disk": "yellow",
    "host-to-device": "magenta",
    "compute": "blue",
    "attention": "green",
    "device-to-host": "bright_magenta",
    "memory": "cyan",
    "progress": "green",
}
_MOST_BAR = 60


@dataclass(frozen=True, slots=True)
class BatchView:
    """How far a batch is; `total`, `seconds_left` and what was predicted of the whole are None where they are
    unknown."""

    done: int
    failed: int
    total: int | None
    elapsed: float
    seconds_left: float | None
    predicted: float | None = None


@dataclass(frozen=True, slots=True)
class EngineView:
    """`now` and `overall`: (generated, prompt) tokens per second."""

    status: Status
    now: tuple[float, float]
    overall: tuple[float, float]


class Bar:
    """A bar as wide as there is room, up to a limit; whole cells and one of eighths."""

    def __init__(self, share: float, color: str) -> None:
        self._share, self._color = min(1.0, max(0.0, share)), color

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, _MOST_BAR)
        eighths = round(self._share * width * 8)
        full, part = divmod(eighths, 8)
        plain = console.legacy_windows or not options.encoding.startswith("utf")
        text = "#" * full if plain else "█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")
        yield Segment(text, Style(color=self._color))
        yield Segment(("." if plain else "·") * (width - len(text)), Style(dim=True))


def render(engine: EngineView, batch: BatchView | None) -> RenderableType:
    """The whole view: progress, throughput, a bar for each lane, memory, sequences."""
    status = engine.status
    bars = Table.grid(padding=(0, 1), expand=True)
    bars.add_column(no_wrap=True)
    bars.add_column(ratio=1)
    bars.add_column(no_wrap=True, justify="right")
    if batch is not None and batch.total:
        share = batch.done / batch.total
        bars.add_row("progress", Bar(share, COLORS["progress"]), f"{share:.0%}")
    for lane in LANES:
        share = status.lanes.get(lane, 0.0)
        bars.add_row(lane, Bar(share, COLORS[lane]), f"{share:.0%}")
    used, budget = status.memory.get("used", 0), status.memory.get("budget", 0)
    bars.add_row("memory", Bar(used / budget if budget else 0.0, COLORS["memory"]), _memory(status))
    return Group(*map(_line, _lines(engine, batch)), bars)


def _lines(engine: EngineView, batch: BatchView | None) -> Iterable[list[str]]:
    status = engine.status
    if batch is not None:
        total = "" if batch.total is None else f" of {batch.total:,}"
        yield [
            f"{batch.done:,}{total} done",
            f"{batch.failed:,} failed",
            f"elapsed {clock(batch.elapsed)}",
            f"left {clock(batch.seconds_left)}",
            *([] if batch.predicted is None else [f"predicted {clock(batch.predicted)}"]),
        ]
    now, overall = engine.now, engine.overall
    yield [f"generated {now[0]:,.1f} tok/s", f"prompts {now[1]:,.1f} tok/s", f"overall {overall[0]:,.1f} tok/s"]
    parts = [f"{status.running:,} running", f"{status.waiting:,} waiting", f"{status.done:,} done"]
    for who, counter in (("workers", "restarts"), ("engine", "engine_restarts")):
        if restarts := int(status.totals.get(counter, 0)):
            parts.append(f"{who} started again: {restarts}")
    yield parts


def _line(parts: list[str]) -> Text:
    return Text("  ·  ".join(parts), overflow="ellipsis", no_wrap=True)


def _memory(status: Status) -> str:
    used, peak, budget = (status.memory.get(name, 0) for name in ("used", "peak", "budget"))
    return f"{format_size(used)} of {format_size(budget)}, peak {format_size(peak)}"

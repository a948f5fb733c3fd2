"""What the terminal shows, at several widths."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flexgen_lite.cli.live_view import BatchView, EngineView, render
from flexgen_lite.wire.client_messages import Status

STATUS = Status(
    running=64,
    waiting=1200,
    done=34_567,
    lanes={"disk": 0.2, "host-to-device": 0.0, "compute": 0.93, "attention": 1.0, "device-to-host": 0.0},
    totals={"restarts": 2.0, "engine_restarts": 1.0},
    memory={"budget": 24 << 30, "used": 12 << 30, "peak": 18 << 30},
)
ENGINE = EngineView(STATUS, (1234.5, 99_999.9), (1100.0, 5.0))


def text_of(engine: EngineView, batch: BatchView | None, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(render(engine, batch))
    return out.getvalue().rstrip("\n").split("\n")


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_everything_is_there_and_nothing_is_wider_than_the_terminal(width: int) -> None:
    lines = text_of(ENGINE, BatchView(120_000, 3, 200_000, 7321, 5000), width)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    for part in ("120,000 of 200,000 done", "3 failed", "elapsed 2:02:01", "generated 1,234.5 tok/s", "64 running"):
        assert part in text
    for lane in ("disk", "host-to-device", "compute", "attention", "device-to-host", "memory", "progress"):
        assert sum(line.startswith(lane) for line in lines) == 1
    assert "left 1:23:20" in text or width < 80
    if width >= 80:
        assert "1,200 waiting" in text and "workers started again: 2" in text and "overall 1,100.0 tok/s" in text
        assert "engine started again: 1" in text or width == 80
        assert "12.0 GiB of 24.0 GiB, peak 18.0 GiB" in text


def test_bars_are_as_long_as_the_shares() -> None:
    lines = {line.split()[0]: line for line in text_of(ENGINE, None, 200)}
    assert lines["attention"].count("█") == 60 and lines["disk"].count("█") == 12
    assert "█" not in lines["host-to-device"] and lines["compute"].endswith("93%")


def test_what_is_not_known() -> None:
    text = "\n".join(text_of(ENGINE, BatchView(0, 0, None, 1, None), 100))
    assert "0 done" in text and "left unknown" in text and "progress" not in text
    nothing = EngineView(Status(0, 0, 0, {}, {}, {}), (0.0, 0.0), (0.0, 0.0))
    assert "0 running" in "\n".join(text_of(nothing, None, 80))

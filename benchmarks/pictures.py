"""The pictures in README.md, made from a real run of the demo: python -m benchmarks.pictures

That of the report is the top of its page as a browser draws it, for which `pip install PyQt6-WebEngine` is needed.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.console import RenderableType

from flexgen_lite.batch.result_file import ResultWriter
from flexgen_lite.batch.run import BatchRun
from flexgen_lite.cli.console import LiveConsole
from flexgen_lite.cli.demo import RAM, SEED, write_requests
from flexgen_lite.cli.run_batch import watch
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.demo.pretrained import MODEL
from flexgen_lite.demo.records import generate
from flexgen_lite.launcher.supervisor import EngineSupervisor
from flexgen_lite.report.page import write_report

FOLDER = Path(__file__).parents[1] / "docs" / "images"
REPORT = "report.html"
RECORDS = 600
WIDTH = 92


class _Kept:
    """Takes the place of the terminal."""

    is_started = True

    def __init__(self) -> None:
        self.views: list[RenderableType] = []

    def update(self, view: RenderableType, refresh: bool) -> None:
        self.views.append(view)

    def stop(self) -> None:
        pass


def run_demo(folder: Path) -> tuple[str, list[RenderableType]]:
    """(the plan, every view of a run); its trace and the report of it are in `folder`."""
    kept: Any = _Kept()
    plans: list[str] = []
    console = LiveConsole()
    console._live = kept
    trace, requests, results = folder / "demo.trace.json", folder / "records.jsonl", folder / "labels.jsonl"
    config = EngineConfig(model=str(MODEL), ram=RAM, layer_slots=3, dtype="float32", trace=trace)
    write_requests(requests, generate(SEED, RECORDS, "held_out"))
    with (
        EngineSupervisor(config, on_plan=plans.append) as engine,
        engine.connect() as client,
        ResultWriter(results) as writer,
    ):
        watch(BatchRun(client, requests, writer), console)
    write_report(trace, folder / REPORT)
    return plans[0], kept.views


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan, views = run_demo(Path(folder))
        drawn = [sys.executable, "-m", "benchmarks.screenshot", f"{folder}/{REPORT}", str(FOLDER / "report.png")]
        subprocess.run(drawn, check=True)
    console = RichConsole(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print("$ flexgen-lite demo --records 600", highlight=False)
    for line in plan.splitlines()[:5]:
        console.print(line, markup=False, highlight=False)
    console.print()
    console.print(views[len(views) * 2 // 3])
    picture = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="flexgen-lite"), flags=re.DOTALL)
    (FOLDER / "live-view.svg").write_text(picture, encoding="utf-8")  # in the fonts that the reader has


if __name__ == "__main__":
    main()

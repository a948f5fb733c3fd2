"""How long a compute worker takes to start, and another one in its place when it is killed.

    python -m benchmarks.restart MODEL --times 5

Prints one JSON object: seconds from the start of an engine until it is ready, and from a kill of its compute worker
until the next one is, over `--times` engines with one loss each; median, least and most.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.launcher.process import EngineProcess


def compute_worker(coordinator: int) -> psutil.Process:
    processes = psutil.Process(coordinator).children(recursive=True)
    (found,) = [p for p in processes if "compute worker" in p.cmdline() and p.name() != "zygote"]
    return found


def measure(model: Path) -> tuple[float, float]:
    """Seconds of a start and of a restart."""
    lines: list[tuple[float, str]] = []
    begun = time.monotonic()
    config = EngineConfig(model=str(model), attention_workers=1, attention_threads=1)
    with EngineProcess(config, on_log=lambda text: lines.append((time.monotonic(), text))) as engine:
        start = time.monotonic() - begun
        killed = time.monotonic()
        compute_worker(engine.pid).send_signal(signal.SIGKILL)
        while not (ready := [at for at, text in lines if re.match(r"compute worker .* is ready", text)]):
            time.sleep(0.001)
    return start, ready[0] - killed


def summary(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--times", type=int, default=5)
    args = parser.parse_args()
    measured = [measure(args.model) for _ in range(args.times)]
    starts, restarts = zip(*measured, strict=True)
    print(json.dumps({"start_seconds": summary(starts), "restart_seconds": summary(restarts)}, indent=1))


if __name__ == "__main__":
    main()

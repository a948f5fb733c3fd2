"""How well `flexgen-lite plan` predicts: jobs predicted, then run, over models, budgets, blocks and workloads.

    python -m benchmarks.prediction MODEL [MODEL ...] [--dtype bfloat16] [--shares 1.2,0.6,0.1] [--jobs 0,1,2,3]
        [-o TABLE.md]

Each model is calibrated first, if it never was, or with `--calibrate`. Budgets are shares of its weights beside 1.5
GiB; the smallest has to hold two layers. Jobs are 0: short prompts and answers of 16 tokens; 1: ragged prompts up to
300 tokens, answers of 6; 2: prompts of 256 tokens and one token each; 3: eight sequences, answers of 12; and 4: as 0,
in two micro-batches given by hand. Prompts are random tokens. Each job is predicted with the rate of plain reads just
before it. Disks drift: where that is not the rate just after it, within 8 %, the job runs again, three times at most.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_lite import FlexGenLite, SamplingParams
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.job import JobRequest
from flexgen_lite.launcher.calibrate import calibrated, disk_now
from flexgen_lite.launcher.forecast import Forecaster
from flexgen_lite.plan.machine import inspect_machine

BESIDE = 1536 << 20  # bytes, beside weights
VOCABULARY = 30000
DRIFT, TRIES = 0.08, 3


@dataclass(frozen=True, slots=True)
class JobShape:
    sequences: int
    shortest: int
    longest: int
    answer: int
    options: tuple[tuple[str, int], ...] = ()

    def prompts(self) -> list[list[int]]:
        draw = random.Random(self.sequences)
        lengths = [draw.randint(self.shortest, self.longest) for _ in range(self.sequences)]
        return [[draw.randrange(5, VOCABULARY) for _ in range(length)] for length in lengths]


JOBS = (
    JobShape(32, 16, 48, 16),
    JobShape(16, 20, 300, 6),
    JobShape(10, 256, 256, 1),
    JobShape(8, 32, 64, 12),
    JobShape(32, 16, 48, 16, (("micro_batches", 2),)),
)


@dataclass(frozen=True, slots=True)
class Cell:
    model: str
    ram: int
    streamed: int
    job: int
    predicted: float
    measured: float
    disk: float
    lanes: dict[str, float]

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1

    def row(self) -> str:
        lane, share = max(self.lanes.items(), key=lambda item: item[1])
        return (
            f"| {self.model} | {self.ram / 2**30:.1f} GiB | {self.streamed} | {self.job} | {lane} {share:.0%} | "
            f"{self.predicted:.1f} s | {self.measured:.1f} s | {self.error:+.1%} |"
        )


HEAD = (
    "| model | RAM | streamed layers | job | busiest lane | predicted | measured | error |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def run_job(engine: FlexGenLite, shape: JobShape) -> tuple[float, dict[str, float]]:
    """Seconds, and busy shares of the lanes."""
    before = engine.status().totals
    start = time.perf_counter()
    engine.generate(shape.prompts(), SamplingParams(max_tokens=shape.answer, temperature=0.0, ignore_eos=True))
    seconds = time.perf_counter() - start
    after = engine.status().totals
    lanes = ("disk", "compute", "attention", "host-to-device")
    keys = {lane: f"{lane}_seconds" for lane in lanes}
    busy = {lane: after.get(key, 0.0) - before.get(key, 0.0) for lane, key in keys.items()}
    return seconds, {lane: value / seconds for lane, value in busy.items()}


def cells_of(model: str, args: argparse.Namespace, cells: list[Cell]) -> None:
    options: dict[str, Any] = json.loads(args.options) | ({"dtype": args.dtype} if args.dtype else {})
    calibration = calibrated(EngineConfig(model=model, **options), lambda _: None, again=args.calibrate)
    spec = calibration.opened.spec
    print(f"{Path(model).name}: calibrated, {spec.weight_bytes / 1e9:.1f} GB of weights", flush=True)
    for share in map(float, args.shares.split(",")):
        ram = BESIDE + int(share * spec.weight_bytes)
        by_options: dict[tuple[tuple[str, int], ...], list[int]] = {}
        for number in map(int, args.jobs.split(",")):
            by_options.setdefault(JOBS[number].options, []).append(number)
        for by_hand, numbers in by_options.items():
            settings = options | dict(by_hand) | {"ram": ram}
            with FlexGenLite(model, **settings) as engine:
                for number in numbers:
                    shape = JOBS[number]
                    for _ in range(TRIES):
                        disk = disk_now(spec)
                        measured, lanes = run_job(engine, shape)
                        after = disk_now(spec)
                        if not disk or not after or abs(after / disk - 1) <= DRIFT:
                            break
                    requests = [JobRequest(len(p), shape.answer, shape.answer) for p in shape.prompts()]
                    forecaster = Forecaster(calibration, inspect_machine(), None, requests, disk)
                    found = forecaster.forecast(EngineConfig(model=model, **settings))
                    assert found.job is not None
                    streamed = len(found.setup.plan.ring_layers(spec.num_layers))
                    cell = Cell(
                        Path(model).name, ram, streamed, number, found.job.seconds, measured, disk or 0.0, lanes
                    )
                    cells.append(cell)
                    print(cell.row(), f"disk {(disk or 0) / 1e9:.2f}, then {(after or 0) / 1e9:.2f} GB/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--dtype", default="")
    parser.add_argument("--options", default="{}", help="JSON; other keys of the configuration")
    parser.add_argument("--shares", default="1.2,0.6,0.1")
    parser.add_argument("--jobs", default="0,1,2,3")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    cells: list[Cell] = []
    for model in args.models:
        cells_of(model, args, cells)
    errors = [abs(cell.error) for cell in cells]
    within = sum(error <= 0.1 for error in errors) / len(errors)
    summary = f"{len(cells)} cells: median error {statistics.median(errors):.1%}, {within:.0%} within 10 %"
    print(summary)
    if args.output is not None:
        args.output.write_text("\n".join([HEAD, *(cell.row() for cell in cells), "", summary, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Whether settings that are found are the fastest: the plan's rules, the search's choice, and others by brute force.

    python -m benchmarks.policy MODEL [MODEL ...] [--rams 1.7GiB,2.7GiB] [--jobs 0,1] [--dtype bfloat16] [-o TABLE.md]
        [--at-once 16,48,96] [--rows 256,1024] [--micro-batches 1,2]

Jobs are 0: 64 prompts of 24 to 72 tokens, answers of 12; 1: 24 prompts of 150 to 350 tokens, answers of 4; and 2: 96
prompts of 8 to 24 tokens, answers of 24. Each choice runs the same job on an engine of its own; the rules' and the
search's run twice, before and after the others, and their mean counts, as a machine drifts. A choice that a budget does
not hold is left out.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.prediction import JobShape
from flexgen_lite import FlexGenLite, SamplingParams
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.job import JobRequest
from flexgen_lite.errors import EngineError
from flexgen_lite.launcher.calibrate import calibrated, disk_now
from flexgen_lite.launcher.forecast import Forecaster
from flexgen_lite.launcher.search import search
from flexgen_lite.plan.machine import inspect_machine

JOBS = (JobShape(64, 24, 72, 12), JobShape(24, 150, 350, 4), JobShape(96, 8, 24, 24))
RULES, SEARCH = "rules", "search"
HEAD = (
    "| model | RAM | job | rules | search | predicted | search chose | best of the others | search to best | "
    "rules to best |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


@dataclass(frozen=True, slots=True)
class Cell:
    model: str
    ram: str
    job: int
    seconds: dict[str, float]  # by choice
    predicted: float  # of the search's
    chosen: str

    @property
    def best(self) -> str:
        return min(self.seconds, key=lambda name: self.seconds[name])

    def to_best(self, name: str) -> float:
        return self.seconds[name] / self.seconds[self.best] - 1

    def row(self) -> str:
        others = {name: value for name, value in self.seconds.items() if name not in (RULES, SEARCH)}
        name = min(others, key=lambda one: others[one])
        return (
            f"| {self.model} | {self.ram} | {self.job} | {self.seconds[RULES]:.1f} s | {self.seconds[SEARCH]:.1f} s | "
            f"{self.predicted:.1f} s | {self.chosen or 'as the rules'} | {others[name]:.1f} s: {name} | "
            f"{self.to_best(SEARCH):+.1%} | {self.to_best(RULES):+.1%} |"
        )


def run(model: str, settings: dict[str, Any], shape: JobShape) -> float:
    with FlexGenLite(model, **settings) as engine:
        start = time.perf_counter()
        engine.generate(shape.prompts(), SamplingParams(max_tokens=shape.answer, temperature=0.0, ignore_eos=True))
        return time.perf_counter() - start


def others(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    found = {}
    numbers = [[int(one) for one in text.split(",")] for text in (args.at_once, args.rows, args.micro_batches)]
    for count, rows, batches in itertools.product(*numbers):
        if count <= rows * batches:
            settings = {"max_sequences": count, "micro_batch_tokens": rows, "micro_batches": batches}
            found[f"{count} at once, {batches} x {rows} rows"] = settings
    return found


def cell_of(model: str, ram: str, job: int, args: argparse.Namespace) -> Cell:
    shape, base = JOBS[job], {"dtype": args.dtype, "ram": ram}
    config = EngineConfig(model=model, **base)
    calibration = calibrated(EngineConfig(model=model, dtype=args.dtype), print)
    requests = [JobRequest(len(prompt), shape.answer, shape.answer) for prompt in shape.prompts()]
    forecaster = Forecaster(calibration, inspect_machine(), None, requests, disk_now(calibration.opened.spec))
    start = time.perf_counter()
    policy = search(forecaster, config)
    print(f"{Path(model).name} {ram} job {job}: searched for {time.perf_counter() - start:.1f} s, {policy.settings}")
    first = {RULES: {}, SEARCH: dict(policy.settings)}
    seconds: dict[str, list[float]] = {}
    for name, settings in (*first.items(), *others(args).items(), *reversed(first.items())):
        try:
            seconds.setdefault(name, []).append(run(model, base | settings, shape))
        except EngineError as error:
            print(f"{name}: {error}", flush=True)
        else:
            print(f"  {name}: {seconds[name][-1]:.1f} s", flush=True)
    found = {name: statistics.mean(times) for name, times in seconds.items() if times}
    chosen = ", ".join(f"{key}={value}" for key, value in policy.settings.items())
    predicted = policy.forecast.job.seconds if policy.forecast.job else 0.0
    return Cell(Path(model).name, ram, job, found, predicted, chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rams", default="2GiB")
    parser.add_argument("--jobs", default="0,1,2")
    parser.add_argument("--at-once", default="16,48,96")
    parser.add_argument("--rows", default="256,1024")
    parser.add_argument("--micro-batches", default="1")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    cells: list[Cell] = []
    for model, ram, job in itertools.product(args.models, args.rams.split(","), map(int, args.jobs.split(","))):
        cells.append(cell_of(model, ram, job, args))
        print(cells[-1].row(), flush=True)
    within = sum(cell.to_best(SEARCH) <= 0.05 for cell in cells)
    worse = sum(cell.seconds[SEARCH] > 1.02 * cell.seconds[RULES] for cell in cells)
    summary = f"{len(cells)} cells: the search within 5 % of the best in {within}, slower than the rules in {worse}"
    print(summary)
    if args.output is not None:
        args.output.write_text("\n".join([HEAD, *(cell.row() for cell in cells), "", summary, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()

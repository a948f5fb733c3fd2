"""Whether settings that are found are the fastest: the plan's rules, the search's choice, and others by brute force.

    python -m benchmarks.policy MODEL [--ram 2GiB] [--sequences 96] [--prompt-tokens 64] [--max-tokens 12]
        [--at-once 16,48,96] [--rows 256,1024] [--dtype bfloat16] [--rounds 1]

Each choice runs the same job on an engine of its own, `--rounds` times in turns; the median of its seconds counts.
Printed are predicted and measured seconds of each, and how far each is from the best that was measured.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

from flexgen_lite import FlexGenLite, SamplingParams
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.job import JobRequest
from flexgen_lite.errors import EngineError
from flexgen_lite.launcher.calibrate import calibrated
from flexgen_lite.launcher.forecast import Forecaster, disk_now
from flexgen_lite.launcher.search import search
from flexgen_lite.plan.machine import inspect_machine
from flexgen_lite.plan.plan import PlanError


def run(model: str, settings: dict[str, Any], prompts: list[list[int]], max_tokens: int) -> float:
    with FlexGenLite(model, **settings) as engine:
        start = time.perf_counter()
        engine.generate(prompts, SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True))
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ram", default="2GiB")
    parser.add_argument("--sequences", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=12)
    parser.add_argument("--at-once", default="16,48,96")
    parser.add_argument("--rows", default="256,1024")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    draw = random.Random(0)
    lengths = [draw.randint(args.prompt_tokens // 2, args.prompt_tokens * 3 // 2) for _ in range(args.sequences)]
    prompts = [[draw.randrange(5, 30000) for _ in range(length)] for length in lengths]
    base = {"dtype": args.dtype, "ram": args.ram}
    config = EngineConfig(model=args.model, **base)
    calibration = calibrated(config, print)
    requests = [JobRequest(length, args.max_tokens, args.max_tokens) for length in lengths]
    disk = disk_now(calibration.opened.spec)
    forecaster = Forecaster(calibration, inspect_machine(), None, requests, disk)
    start = time.perf_counter()
    policy = search(forecaster, config)
    print(f"searched for {time.perf_counter() - start:.1f} s: {policy.settings}, {policy.gain:.2f} times as fast")
    choices: dict[str, dict[str, Any]] = {"rules": {}, "search": dict(policy.settings)}
    for count in map(int, args.at_once.split(",")):
        for rows in map(int, args.rows.split(",")):
            if count <= rows:
                settings = {"max_sequences": count, "micro_batch_tokens": rows, "micro_batches": 1}
                choices[f"{count} at once, {rows} rows"] = settings
    measured: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for name, settings in choices.items():
            try:
                measured.setdefault(name, []).append(run(args.model, base | settings, prompts, args.max_tokens))
            except EngineError as error:
                print(f"{name}: {error}", flush=True)
    best = min(statistics.median(times) for times in measured.values() if times)
    for name, times in measured.items():
        try:
            job = forecaster.forecast(config.model_copy(update=choices[name])).job
        except PlanError:
            continue
        if times and job is not None:
            taken = statistics.median(times)
            text = f"predicted {job.seconds:7.1f} s  measured {taken:7.1f} s  {taken / best - 1:+.1%} of the best"
            print(f"{name:<24}{text}", flush=True)


if __name__ == "__main__":
    main()

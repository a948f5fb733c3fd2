"""Hours of work under fire: engines whose workers are killed, stopped and broken at random, and batch runs that are
killed and started again; every token is compared with an undisturbed run.

    python -m tests.soak [--minutes 60] [--seed 0] [--family opt]

Each round prints a line; the last lines are the totals. Exits with 1 at the first difference or leak, with the seed
that shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexgen_lite import FlexGenLite, SamplingParams
from tests.engine_processes import workers_of
from tests.fault_injection import Fault, inject, struck
from tests.tiny_hybrids import HYBRIDS
from tests.tiny_models import make_model, ragged_prompts, some_alike

PROMPTS = some_alike(ragged_prompts(1200, longest=40))
BODY: dict[str, Any] = {"max_tokens": 60, "temperature": 0.9, "top_k": 50, "seed": 7, "ignore_eos": True}
SAMPLED = SamplingParams(**BODY)
LAYOUTS: list[dict[str, Any]] = [
    {},
    {"layer_slots": 2},
    {"layer_slots": 3, "micro_batches": 2},
    {"stage_weights": True, "layer_slots": 2},
    {"stage_weights": True, "layer_slots": 2, "cpu_projections": "qkv"},
    {"micro_batches": 3, "micro_batch_tokens": 64, "max_sequences": 24},
    {"kv_disk": "8MiB", "layer_slots": 2},
]
FIXED = {"dtype": "float32", "attention_workers": 2, "attention_threads": 1, "worker_timeout": 4}


class Soak:
    def __init__(self, folder: Path, seed: int, shots: bool = True, family: str = "opt") -> None:
        """`shots`: signals from outside, which on a busy machine may hit a worker again before it has started.
        `family`: of the model, one of tiny_models.FAMILIES."""
        self.folder = folder
        self.shots = shots
        self.draw = random.Random(seed)
        self.places = ["put", "put", "mix"] if family in HYBRIDS else []  # that others do not come by
        self.counts: Counter[str] = Counter()
        self.model = make_model(family, folder / "model")
        with FlexGenLite(self.model, **FIXED) as engine:
            self.expected = [list(c.token_ids) for c in engine.generate(PROMPTS, SAMPLED)]
        self.requests = folder / "requests.jsonl"
        with self.requests.open("w") as file:
            for number, prompt in enumerate(PROMPTS):
                body = {**BODY, "prompt": prompt, "return_token_ids": True}
                row = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
                file.write(json.dumps(row) + "\n")

    def round(self, number: int) -> None:
        before = _left_behind()
        (self.batch_round if number % 3 == 2 else self.engine_round)(number)
        deadline = time.monotonic() + 15
        while (after := _left_behind()) != before and time.monotonic() < deadline:
            time.sleep(0.2)
        _check(after == before, f"left behind: {after} instead of {before}")

    def layout(self) -> dict[str, Any]:
        layout = self.draw.choice(LAYOUTS)
        return layout | {"kv_disk_dir": str(self.folder / "kv")} if "kv_disk" in layout else layout

    def engine_round(self, number: int) -> None:
        """Faults inside the workers and signals from outside, on one engine."""
        draw, faults = self.draw, self.folder / f"faults-{number}"
        drawn = [
            Fault(
                draw.choice(["advance", "leave", "attend", "begin", "load", "pack", "open", *self.places]),
                draw.randrange(1, 150),
                draw.choice(["SIGKILL", "SIGSEGV", "exit", "raise"]),
                after=draw.random() < 0.5,
                worker=draw.choice(["worker", "worker 0", "worker 1", "loader"]),
            )
            for _ in range(draw.randrange(0, 6))
        ]
        drawn = [fault for fault in drawn if fault.action != "raise" or fault.place not in ("open", "pack")]
        with pytest.MonkeyPatch.context() as patch:
            inject(patch, faults, *drawn)
            with FlexGenLite(self.model, **FIXED, **self.layout()) as engine:
                job = engine.submit(PROMPTS, SAMPLED)
                over = threading.Event()
                shooter = threading.Thread(target=self._shoot, args=(engine._engine.pid, over))
                if self.shots:
                    shooter.start()
                try:
                    found = [list(completion.token_ids) for completion in job.results()]
                finally:
                    over.set()
                    if self.shots:
                        shooter.join()
                self.counts["workers replaced"] += int(engine.status().totals["restarts"])
                _check(engine.engine_restarts == 0, "workers are replaced, not the engine")
        self.counts["engine runs"] += 1
        self.counts["faults inside workers"] += len(struck(faults))
        self._compare(found)

    def _shoot(self, coordinator: int, over: threading.Event) -> None:
        while not over.wait(self.draw.uniform(0.3, 3.0)):
            if workers := [*workers_of(coordinator).values()]:
                number = self.draw.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
                self.draw.choice(workers).send_signal(number)
                self.counts[f"{number.name} from outside"] += 1
                over.wait(6)  # no worker is lost three times in a row without a chance to work

    def batch_round(self, number: int) -> None:
        """run-batch and its coordinator killed at any moment. It outlives the latter, where that got something done in
        between; else, and where it is killed itself, the same command goes on."""
        output = self.folder / f"out-{number}.jsonl"
        command = [sys.executable, "-m", "flexgen_lite", "run-batch", "-i", str(self.requests), "-o", str(output)]
        command += ["--model", str(self.model), "--dtype", "float32"]
        shots, errors = 6, ""
        for _ in range(20):
            run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            while shots and run.poll() is None:
                shots -= 1
                time.sleep(self.draw.uniform(1.0, 12.0))
                self._kill_one(run)
            _, errors = run.communicate(timeout=300)
            _check("Traceback" not in errors, errors)
            self.counts["engines started again"] += errors.count("; starting it again; ")
            if run.returncode == 0:
                break
        else:
            raise AssertionError(f"it does not come to an end: {errors}")
        rows = [json.loads(line) for line in output.read_bytes().splitlines()]
        found = {row["custom_id"]: row["response"]["body"]["choices"][0]["token_ids"] for row in rows}
        _check(len(rows) == len(found) == len(PROMPTS), f"{len(rows)} rows, {len(found)} of them different")
        self.counts["batch runs"] += 1
        self._compare([found[str(number)] for number in range(len(PROMPTS))])

    def _kill_one(self, run: subprocess.Popen[str]) -> None:
        coordinators = psutil.Process(run.pid).children()
        victim = self.draw.choice(["run-batch", "coordinator", "coordinator"]) if coordinators else "run-batch"
        if run.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it is between two engines
                os.kill(run.pid if victim == "run-batch" else coordinators[0].pid, signal.SIGKILL)
                self.counts[f"{victim} killed"] += 1

    def _compare(self, found: list[list[int]]) -> None:
        wrong = [i for i, (a, b) in enumerate(zip(found, self.expected, strict=True)) if a != b]
        _check(not wrong, f"rows {wrong[:5]} differ from the undisturbed run")
        self.counts["rows compared"] += len(found)


def _left_behind() -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """Descriptors of this process, entries of /dev/shm, and of the runtime directory but for dead ones."""
    runtime = Path(os.environ["XDG_RUNTIME_DIR"])
    alive = [p.name for p in runtime.iterdir() if psutil.pid_exists(int(p.name.split("-")[2]))]
    return psutil.Process().num_fds(), tuple(sorted(os.listdir("/dev/shm"))), tuple(sorted(alive))


def _check(good: bool, text: str) -> None:
    if not good:
        raise AssertionError(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", default="opt", help="of the model, one of those of tests/tiny_models.py")
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fgs-") as folder:
        (Path(folder) / "r").mkdir()
        os.environ["XDG_RUNTIME_DIR"] = f"{folder}/r"
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        soak = Soak(Path(folder), args.seed, family=args.family)
        soak.engine_round(-1)  # libraries open descriptors of their own at first
        number = 0
        while time.monotonic() - start < 60 * args.minutes:
            soak.round(number)
            number += 1
            print(f"{(time.monotonic() - start) / 60:6.1f} min  " + json.dumps(soak.counts), flush=True)
    print(f"seed {args.seed}: {number} rounds, no row lost, none different")


if __name__ == "__main__":
    main()

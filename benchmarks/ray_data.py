"""Ray Data beside `run-batch`, on the same rows: what the way through Ray costs, and what it costs if gone naively.

    python -m benchmarks.ray_data --rows 2000 --times 3

Contestants, in turns:

- run-batch: the file through an engine of its own, as the command does it;
- ours: Parquet files through `flexgen_lite.ray`, one actor, batches of 256 rows, 16 of them at once;
- naive-N: an actor that is given N rows, has them all answered, and is given the next N.

The seconds are those from the first row that is given to an engine until the last row is written (its file's last
change): starts of engines, of Ray and of actors are apart. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from flexgen_lite import FlexGenLite, SamplingParams
from flexgen_lite.batch.result_file import ResultWriter
from flexgen_lite.batch.run import BatchRun
from flexgen_lite.batch.survey import survey
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.demo.pretrained import MODEL
from flexgen_lite.demo.records import END_OF_LINE, generate
from flexgen_lite.launcher.supervisor import EngineSupervisor
from flexgen_lite.ray.actor import FlexGenLiteEngine
from flexgen_lite.ray.processor import FlexGenLiteProcessorConfig, Processor
from flexgen_lite.ray.shares import Share

BEGUN = "begun"  # a file that has the time at which the first row was given to an engine
PARAMS = {"max_tokens": 96, "temperature": 0.0}
FILES = 8
INTERVAL_SECONDS = 5.0


def note_begin(folder: Path) -> None:
    path = folder / BEGUN
    if not path.exists():
        path.write_text(str(time.time()))


class TimedEngine(FlexGenLiteEngine):
    """Tells when it is given its first rows."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self._folder = folder

    async def __call__(self, table: pa.Table) -> pa.Table:
        note_begin(self._folder)
        return await super().__call__(table)


class TimedProcessor(Processor):
    engine = TimedEngine
    folder: Path

    def _map_batches_kwargs(self, share: Share) -> dict[str, Any]:
        kwargs = super()._map_batches_kwargs(share)
        kwargs["fn_constructor_kwargs"]["folder"] = self.folder
        return kwargs


class NaiveEngine:
    """One batch at a time."""

    def __init__(self, model: str, options: dict[str, Any], folder: Path) -> None:
        self._model = FlexGenLite(model, **options)
        self._folder = folder

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        note_begin(self._folder)
        found = self._model.generate([str(prompt) for prompt in batch["prompt"]], SamplingParams(**PARAMS))
        return {**batch, "generated_text": [completion.text for completion in found]}


def seconds_of(folder: Path, written: list[Path]) -> float:
    return max(path.stat().st_mtime for path in written) - float((folder / BEGUN).read_text())


def run_batch(source: Path, folder: Path, model: str, options: dict[str, Any]) -> tuple[float, int]:
    """Seconds, and rows that failed."""
    lines, output = source / "rows.jsonl", folder / "results.jsonl"
    config = EngineConfig(model=model, **options)
    with (
        ResultWriter(output, overwrite=True, warn=print) as results,
        EngineSupervisor(config, expected=survey(lines)) as engine,
        engine.connect() as client,
    ):
        run = BatchRun(client, lines, results)
        note_begin(folder)
        progress = run.run(lambda _: None, INTERVAL_SECONDS)
    return seconds_of(folder, [output]), progress.failed


def ours(source: Path, folder: Path, model: str, options: dict[str, Any]) -> tuple[float, int]:
    config = FlexGenLiteProcessorConfig(model_source=model, engine_kwargs=options)
    processor = TimedProcessor(config, None, None, {}, {}, {})
    processor.folder = folder
    processor(ray.data.read_parquet(str(source / "parquet"))).write_parquet(str(folder / "out"))
    return _of_files(folder)


def naive(rows: int, source: Path, folder: Path, model: str, options: dict[str, Any]) -> tuple[float, int]:
    dataset = ray.data.read_parquet(str(source / "parquet")).map_batches(
        NaiveEngine,
        fn_constructor_kwargs={"model": model, "options": options, "folder": folder},
        batch_size=rows, compute=ray.data.ActorPoolStrategy(size=1), num_cpus=1,
    )  # fmt: skip
    dataset.write_parquet(str(folder / "out"))
    return _of_files(folder)


def _of_files(folder: Path) -> tuple[float, int]:
    written = [*(folder / "out").glob("*.parquet")]
    rows = [row for path in written for row in pq.read_table(path).to_pylist()]
    return seconds_of(folder, written), sum(
        1 for row in rows if row.get("__inference_error__") or not row["generated_text"]
    )


def write_source(source: Path, rows: int) -> None:
    prompts = [f"{record.line}{END_OF_LINE}" for record in generate(seed=5, n=rows, split="held_out")]
    with (source / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, prompt in enumerate(prompts):
            body = {"prompt": prompt, **PARAMS}
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    (source / "parquet").mkdir()
    each = -(-rows // FILES)
    for first in range(0, rows, each):
        own = prompts[first : first + each]
        columns = {"id": range(first, first + len(own)), "prompt": own, "sampling_params": [PARAMS] * len(own)}
        pq.write_table(pa.table(columns), source / "parquet" / f"{first}.parquet")


def measure(contestants: dict[str, Callable[..., tuple[float, int]]], args: argparse.Namespace) -> dict[str, Any]:
    options = {"ram": args.ram, "device": "cpu"}
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    with tempfile.TemporaryDirectory(prefix="fgr-") as made:
        source = Path(made) / "source"
        source.mkdir()
        write_source(source, args.rows)
        for number in range(args.times):
            for name, run in contestants.items():
                folder = Path(made) / f"{name}-{number}"
                folder.mkdir()
                seconds, failed = run(source, folder, args.model, options)
                taken[name].append(seconds)
                print(f"{name}: {seconds:.2f} s, {failed} failed", file=sys.stderr, flush=True)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    return {
        "rows": args.rows,
        "seconds": {name: [round(each, 2) for each in times] for name, times in taken.items()},
        "rows_per_second": {name: round(args.rows / seconds, 1) for name, seconds in medians.items()},
        "times_as_long_as_run_batch": {
            name: round(seconds / medians["run-batch"], 3) for name, seconds in medians.items() if name != "run-batch"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--ram", default="2GiB")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--naive", type=int, nargs="*", default=[64, 256], help="batch sizes")
    args = parser.parse_args()
    ray.init(include_dashboard=False, object_store_memory=500 << 20, logging_level="warning")
    contestants: dict[str, Callable[..., tuple[float, int]]] = {"run-batch": run_batch, "ours": ours}
    contestants |= {f"naive-{rows}": partial(naive, rows) for rows in args.naive}
    print(json.dumps(measure(contestants, args), indent=1))


if __name__ == "__main__":
    main()

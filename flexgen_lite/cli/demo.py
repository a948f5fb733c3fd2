"""The demo: label held-out records with the model that comes along, weights streamed from disk under a small budget."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console as RichConsole
from rich.table import Table

from flexgen_lite.batch.result_file import ResultWriter
from flexgen_lite.batch.run import BatchRun, Progress
from flexgen_lite.cli.console import make_console
from flexgen_lite.cli.run_batch import watch
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.demo.pretrained import MODEL
from flexgen_lite.demo.records import Record, generate, is_correct, prompt
from flexgen_lite.launcher.supervisor import EngineSupervisor
from flexgen_lite.text.sizes import format_size

RAM = "1280MiB"  # of which 128 MiB are for a first start, which compiles the kernels
SEED = 2024
MAX_TOKENS = 96


def run_demo(records: int, ram: str | None, quantization: str | None = None) -> None:
    """Label `records` held-out records and print how it went, and how many answers are right.

    With `quantization` the same records are labelled with the model as it is first, and both are shown side by side.

    Raises:
        EngineError: the engine could not be started, or failed.
    """
    labelled = generate(SEED, records, "held_out")
    settings = {"model": str(MODEL), "ram": ram or RAM, "layer_slots": 3, "dtype": "float32"}
    outcomes = {"as it is": _label(EngineConfig(**settings), labelled)}
    if quantization is not None:
        outcomes[quantization] = _label(EngineConfig(**settings, quantization=quantization), labelled)
    _show_examples(labelled, outcomes[quantization or "as it is"].texts)
    _show_table(outcomes, labelled)


@dataclass(frozen=True, slots=True)
class _Outcome:
    texts: list[str]
    last: Progress


def _label(config: EngineConfig, labelled: Sequence[Record]) -> _Outcome:
    with tempfile.TemporaryDirectory() as folder:
        requests, results = Path(folder) / "records.jsonl", Path(folder) / "labels.jsonl"
        write_requests(requests, labelled)
        with (
            make_console(quiet=False, as_json=False) as console,
            EngineSupervisor(config, on_log=console.log, on_plan=console.plan) as engine,
            engine.connect() as client,
            ResultWriter(results) as writer,
        ):
            last = watch(BatchRun(client, requests, writer), console)
        answers = _read_answers(results)
    return _Outcome([answers.get(f"record-{number}", "") for number in range(len(labelled))], last)


def write_requests(path: Path, labelled: Sequence[Record]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for number, record in enumerate(labelled):
            body = {"prompt": prompt(record), "max_tokens": MAX_TOKENS, "temperature": 0}
            line = {"custom_id": f"record-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def _read_answers(path: Path) -> dict[str, str]:
    answers = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["error"] is None:
                answers[row["custom_id"]] = row["response"]["body"]["choices"][0]["text"]
    return answers


def _show_examples(labelled: Sequence[Record], texts: Sequence[str]) -> None:
    for record, text in list(zip(labelled, texts, strict=True))[:3]:
        print(f"  {record.line}\n    -> {text.strip()}")


def _show_table(outcomes: Mapping[str, _Outcome], labelled: Sequence[Record]) -> None:
    table = Table(title="flexgen-lite demo", show_header=len(outcomes) > 1)
    table.add_column("")
    for name in outcomes:
        table.add_column(name)
    rows = [_told(outcome, labelled) for outcome in outcomes.values()]
    for name in rows[0]:
        table.add_row(name, *(row[name] for row in rows))
    RichConsole().print(table)


def _told(outcome: _Outcome, labelled: Sequence[Record]) -> dict[str, str]:
    last, records = outcome.last, len(labelled)
    lane, share = max(last.lanes.items(), key=lambda item: item[1], default=("none", 0.0))
    return {
        "records": f"{records}, {last.failed} failed",
        "records per second": f"{records / last.busy_seconds:.1f}",
        "generated tokens per second": f"{last.rate:.0f}",
        "exact match": f"{sum(map(is_correct, labelled, outcome.texts)) / records:.1%}",
        "busiest lane": f"{lane}, {share:.0%} busy",
        "peak memory": f"{format_size(last.peak_bytes)} of {format_size(last.budget_bytes)}",
    }

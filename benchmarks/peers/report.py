"""A cell as a table, and everything measured as a JSON and a Markdown file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.cell import Cell, Lane
from benchmarks.peers.job import Options
from benchmarks.peers.trial import Outcome

HEAD = ("system", "options", "seconds", "tok/s", "ours / it", "peak GiB", "tokens as Transformers")
EXPLANATION = """\
Seconds: prefill and decode on the clock, loading excluded; the median over the rounds. tok/s: generated tokens over
these seconds. ours / it: tokens per second of flexgen-lite over the system's, the median of the rounds' ratios (lowest
to highest). Each system runs in a fresh process, all in turn in every round, each with the best of the options it was
tried with. Every run that counts generated all of the wanted tokens: greedy, no stop, the same random token ids. peak:
of the memory cgroup, with pages of files in brackets. tokens as Transformers: share of tokens up to the first that
differs from those of Transformers in bfloat16; random weights leave close calls, so this informs and decides nothing.
"""


def table(cell: Cell) -> list[str]:
    """Lines of a Markdown table, fastest first."""
    measured = [lane for lane in cell.lanes.values() if not lane.refusal]
    lanes = sorted(measured, key=lambda lane: (lane.seconds is None, lane.seconds or 0.0))
    rows = [HEAD, *(_row(cell, lane) for lane in lanes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = [("-" * (width - 1) + ":") if i > 1 else "-" * width for i, width in enumerate(widths)]
    return [lines[0], "| " + " | ".join(rule) + " |", *lines[1:]]


def notes(cell: Cell) -> list[str]:
    """A line per system: every round, and every option it was tried with."""
    lines = []
    for lane in cell.lanes.values():
        rounds = ", ".join(map(_told, lane.rounds))
        tries = "; ".join(f"{_options(outcome.options)}: {_told(outcome)}" for outcome in lane.tries)
        parts = [f"rounds {rounds}" if rounds else lane.refusal, f"tried with {tries}" if tries else ""]
        lines.append(f"- {lane.system.title}: {'; '.join(filter(None, parts))}")
    return lines


def as_json(conditions: Mapping[str, str], versions: Mapping[str, Mapping[str, str]], cells: Sequence[Cell]) -> str:
    content = {"conditions": conditions, "versions": versions, "cells": [_cell_json(cell) for cell in cells]}
    return json.dumps(content, indent=1) + "\n"


def as_markdown(conditions: Mapping[str, str], versions: Mapping[str, Mapping[str, str]], cells: Sequence[Cell]) -> str:
    lines = ["# flexgen-lite and its peers", ""]
    lines += [f"- {key}: {value}" for key, value in conditions.items()]
    lines += [f"- {name}: {', '.join(f'{k} {v}' for k, v in found.items())}" for name, found in versions.items()]
    lines += ["", *EXPLANATION.splitlines()]
    for cell in cells:
        lines += ["", f"## {cell.title}", "", *table(cell), "", *notes(cell)]
    return "\n".join(lines) + "\n"


def new_files(folder: Path, stem: str) -> tuple[Path, Path]:
    """Names for the JSON and the Markdown file that nothing has yet."""
    number = 1
    while (file := folder / f"{stem}{'' if number == 1 else f'-{number}'}.json").exists():
        number += 1
    return file, file.with_suffix(".md")


def _row(cell: Cell, lane: Lane) -> tuple[str, ...]:
    name, rate, same = lane.system.name, cell.rate(lane.system.name), cell.agreement(lane.system.name)
    if lane.seconds is None:
        bound = lane.rate_bound
        told = (f"at most {bound:.2f}" if bound else "-", _at_least(cell, bound))
        return lane.system.title, "-", "failed", *told, _peak(lane), "-"
    return (
        lane.system.title,
        _options(lane.options or {}),
        f"{lane.seconds:.2f}",
        f"{rate:.2f}",
        "1" if name == "ours" else _ratio(cell.ratios(name)),
        _peak(lane),
        "-" if same is None else f"{same:.1%}",
    )


def _ratio(ratios: list[float]) -> str:
    if not ratios:
        return "-"
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.median(ratios):.2f}{spread}"


def _at_least(cell: Cell, bound: float | None) -> str:
    ours = cell.rate("ours") if "ours" in cell.lanes else None
    return f"at least {ours / bound:.1f}" if ours and bound else "-"


def _peak(lane: Lane) -> str:
    """The most of all runs with the best options, or of the last try where none came to its end."""
    outcomes = lane.rounds or lane.tries[-1:]
    held = [outcome.held_bytes / 2**30 for outcome in outcomes if outcome.held_bytes is not None]
    peak = [outcome.peak_bytes / 2**30 for outcome in outcomes if outcome.peak_bytes is not None]
    return f"{max(held):.2f} ({max(peak):.2f})" if held and peak else "-"


def _told(outcome: Outcome) -> str:
    if outcome.seconds is not None:
        return f"{outcome.seconds:.2f} s"
    bound = f", at most {outcome.rate_bound:.2f} tok/s until then" if outcome.rate_bound is not None else ""
    return f"{outcome.failure}{bound}"


def _options(options: Options) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())


def _cell_json(cell: Cell) -> dict[str, Any]:
    return {
        "shape": cell.shape.name,
        "workload": cell.workload.name,
        "title": cell.title,
        "memory_bytes": cell.memory_bytes,
        "systems": {
            name: {
                "refusal": lane.refusal,
                "options": lane.options,
                "median_seconds": lane.seconds,
                "tokens_per_second": cell.rate(name),
                "ours_over_it": cell.ratios(name),
                "tokens_as_transformers": cell.agreement(name),
                "rounds": [outcome.summary() for outcome in lane.rounds],
                "tries": [outcome.summary() for outcome in lane.tries],
            }
            for name, lane in cell.lanes.items()
        },
    }

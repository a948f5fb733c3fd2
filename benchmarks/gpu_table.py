"""`python -m benchmarks.gpu compare`: systems beside each other on one machine, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Contestant:
    """`options` of `benchmarks.gpu run`. Slow peers get fewer prompts and tokens: rates are compared."""

    name: str
    system: str
    options: tuple[str, ...]


def contestants(shape: str, prompts: int, gpu: str) -> list[Contestant]:
    """Ours, FlexGen with placements for this much GPU memory, Accelerate, and Transformers where the model fits it."""
    few = ("--prompts", "8", "--batch", "8", "--max-tokens", "4")
    found = [Contestant("flexgen-lite", "ours", ("--prompts", str(prompts)))]
    found.append(Contestant("flexgen-lite, ragged", "ours", ("--prompts", str(prompts), "--shortest", "16")))
    if shape.startswith("opt"):
        block = ("--prompts", "48", "--batch", "24")
        for percent, cpu in (("20 80 0 100 0 100", True), ("20 80 0 100 0 100", False), ("0 100 0 100 0 100", False)):
            options = (*block, "--percent", percent, *(["--cpu-cache-compute"] if cpu else []))
            name = f"FlexGen, percent {percent}{', attention on the CPU' if cpu else ''}"
            found.append(Contestant(name, "flexgen", options))
    found.append(Contestant("Accelerate, CPU offload", "accelerate", (*few, "--accelerate-gpu", gpu)))
    if shape in ("opt-1.3b", "opt-6.7b", "llama-3-8b"):
        found.append(Contestant("Transformers, all on the GPU", "transformers", ("--prompts", "64", "--batch", "16")))
    return found


def compare(shapes: Iterable[str], prompts: int, gpu: str, out: Path, timeout: float) -> str:
    """Runs all of them and writes table.md, results.json and our traces to `out`. Returns the table."""
    out.mkdir(parents=True, exist_ok=True)
    rates = _run(["rates"], timeout)
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        for one in contestants(shape, prompts, gpu):
            options = ["run", "--shape", shape, "--system", one.system, "--gpu", gpu, *one.options]
            if one.system == "ours":
                options += ["--out", str(out / one.name.replace(", ", "-"))]
            result = _run(options, timeout)
            rows.append({"shape": shape, "name": one.name, **result})
            (out / "results.json").write_text(json.dumps({"rates": rates, "runs": rows}, indent=1), encoding="utf-8")
            print(f"{shape}, {one.name}: {result.get('tokens_per_second', result.get('error'))}", flush=True)
    text = table(rows, rates)
    (out / "table.md").write_text(text, encoding="utf-8")
    return text


def table(rows: list[dict[str, Any]], rates: dict[str, Any]) -> str:
    """Generated tokens per second, ours in terms of each, and how near we came to the rates of the machine."""
    lines = ["| model | system | tokens/s | ours : theirs | GPU memory |", "| --- | --- | --- | --- | --- |"]
    ours = {
        row["shape"]: row["tokens_per_second"] for row in rows if row["name"] == "flexgen-lite" and "error" not in row
    }
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['shape']} | {row['name']} | failed: {row['error']} | | |")
            continue
        ratio = f"{ours[row['shape']] / row['tokens_per_second']:.2f}" if row["shape"] in ours else ""
        peak = row["memory"].get("gpu_peak", 0) / GIB
        lines.append(f"| {row['shape']} | {row['name']} | {row['tokens_per_second']:.2f} | {ratio} | {peak:.1f} GiB |")
    lines += ["", "| model | of ours, per second of passes | rate | of the machine's |", "| --- | --- | --- | --- |"]
    for row in rows:
        if "moved" in row and "error" not in row:
            lines += [f"| {row['shape']} | {text} |" for text in _shares(row["moved"], rates)]
    return "\n".join([*lines, "", *(f"{name}: {value:.1f}" for name, value in rates.items() if name != "error"), ""])


def _shares(moved: dict[str, float], rates: dict[str, Any]) -> list[str]:
    found = []
    for what, key, unit, rate in (
        ("weights copied to the GPU", "uploaded_bytes", "GB", "host_to_device_gb_per_s"),
        ("KV cache read by the CPU", "kv_read_bytes", "GB", "memory_read_gb_per_s"),
        ("products", "flop", "TFLOP", "bfloat16_tflop_per_s"),
    ):
        value = moved[key] / moved["seconds"] / (1e12 if unit == "TFLOP" else 1e9)
        share = f"{value / rates[rate]:.0%}" if rates.get(rate) else ""
        found.append(f"{what} | {value:.1f} {unit}/s | {share}")
    return found


def _run(options: list[str], timeout: float) -> dict[str, Any]:
    """The last line of what a run prints; its error where it fails."""
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:g} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    except (IndexError, ValueError):
        lines = done.stderr.strip().splitlines()
        return {"error": (lines[-1] if lines else f"exit code {done.returncode}")[:200]}

"""What each process of the engine takes of memory, beside what was planned: python -m benchmarks.memory

Models of little width with vocabularies as large as people have them, in two dtypes, under jobs that use everything
that takes memory: ragged rows until thousands of different shapes have been seen, every sampling option, logprobs,
several answers, scores, long prompts. Processes are watched from outside, 20 times a second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexgen_lite import FlexGenLite, SamplingParams
from flexgen_lite.memory.usage import COMPUTE, COORDINATOR, resident_bytes

MIB = 1 << 20
WATCH_SECONDS = 0.05
SHAPE: dict[str, Any] = {
    "num_hidden_layers": 6, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
Prompts = list[list[int]]
ALL_OPTIONS: dict[str, Any] = {
    "temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1, "presence_penalty": 0.5,
    "frequency_penalty": 0.5, "logit_bias": {7: 1.0}, "logprobs": 20, "min_tokens": 3,
}  # fmt: skip


def make_model(vocabulary: int, tokenizer: Path | None, directory: Path) -> Path:
    """In bfloat16, with random weights; with the tokenizer.json of a real model if there is one."""
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, **SHAPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    if tokenizer is not None:
        (directory / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    return directory


def workloads(vocabulary: int, scale: float) -> Iterator[tuple[str, Prompts, Callable[[int], SamplingParams]]]:
    """(name, prompts, params of each)."""
    rng = random.Random(0)

    def prompts(count: int, low: int, high: int) -> Prompts:
        lengths = [rng.randint(low, high) for _ in range(max(1, int(count * scale)))]
        return [[rng.randrange(3, vocabulary) for _ in range(length)] for length in lengths]

    def greedy(most: int, **options: Any) -> Callable[[int], SamplingParams]:
        return lambda k: SamplingParams(
            max_tokens=1 + k * 7919 % most, ignore_eos=True, **{"temperature": 0.0, **options}
        )

    yield "ragged rows", prompts(3000, 1, 180), greedy(70)
    yield "every option", prompts(300, 1, 180), greedy(40, **(ALL_OPTIONS | {"min_tokens": 0}))
    yield "n=8", prompts(60, 1, 100), greedy(30, n=8, temperature=1.0)
    yield "logprobs=20", prompts(300, 1, 180), greedy(60, logprobs=20)
    yield "scores", prompts(300, 2, 600), lambda _: SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=0)
    yield "scores, top 20", prompts(100, 2, 600), lambda _: SamplingParams(max_tokens=0, prompt_logprobs=20)
    yield "long prompts", prompts(30, 1000, 3800), greedy(20)


class Watch:
    """The most that each process takes, seen from outside. `peaks`: bytes by name, since `afresh`."""

    def __init__(self, coordinator: int) -> None:
        self._coordinator = coordinator
        self.peaks: dict[str, int] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def afresh(self) -> None:
        self.peaks = {}

    def _run(self) -> None:
        names: dict[int, str] = {}
        while not self._closing.wait(WATCH_SECONDS):
            with contextlib.suppress(OSError):
                children = Path(f"/proc/{self._coordinator}/task/{self._coordinator}/children").read_text()
                for pid in map(int, children.split()):
                    if pid not in names:
                        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                        names[pid] = words[words.index("--name") + 1] if "--name" in words else "?"
            for pid, name in ({self._coordinator: COORDINATOR} | names).items():
                anonymous, files = resident_bytes(pid)
                taken = anonymous + (files if name == COMPUTE else 0)
                self.peaks[name] = max(self.peaks.get(name, 0), taken)


def measure(model: Path, dtype: str, ram: str, vocabulary: int, scale: float) -> list[dict[str, Any]]:
    rows = []
    with FlexGenLite(model, ram=ram, dtype=dtype, device="cpu") as engine, Watch(engine.engine_pid) as watch:
        for name, prompts, params in workloads(vocabulary, scale):
            watch.afresh()
            begun = time.monotonic()
            answers = engine.generate(prompts, [params(k) for k in range(len(prompts))])
            status = engine.status()
            rows.append(
                {
                    "vocabulary": vocabulary,
                    "dtype": dtype,
                    "job": name,
                    "seconds": round(time.monotonic() - begun, 1),
                    "failed": sum(answer.error is not None for answer in answers),
                    "error": next((answer.error for answer in answers if answer.error), None),
                    "planned": {who: values["planned"] for who, values in status.processes.items()},
                    "taken": watch.peaks,
                    "peak": status.memory["peak"],
                    "budget": status.memory["budget"],
                }
            )
            print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    parts = [f"{who} {row['taken'].get(who, 0) // MIB} of {planned // MIB}" for who, planned in row["planned"].items()]
    beyond = [who for who, planned in row["planned"].items() if row["taken"].get(who, 0) > planned]
    text = f"{row['vocabulary']:>7} {row['dtype']:<9} {row['job']:<15} {row['seconds']:>6} s  " + ", ".join(parts)
    text += f"; all {row['peak'] // MIB} of {row['budget'] // MIB} MiB"
    return text + (f"  BEYOND: {', '.join(beyond)}" if beyond else "") + (f"  {row['error']}" if row["failed"] else "")


def _table(rows: list[dict[str, Any]]) -> str:
    """The most that each process took in any of the jobs, beside what was planned for it; MiB."""
    names = list(rows[0]["planned"])
    lines = ["| vocabulary | dtype | " + " | ".join(names) + " | all, of the budget |"]
    lines.append("|" + " ---: | --- |" + " ---: |" * (len(names) + 1))
    for vocabulary, dtype in dict.fromkeys((row["vocabulary"], row["dtype"]) for row in rows):
        own = [row for row in rows if (row["vocabulary"], row["dtype"]) == (vocabulary, dtype)]
        cells = [
            f"{max(row['taken'].get(name, 0) for row in own) // MIB} of {own[0]['planned'][name] // MIB}"
            for name in names
        ]
        cells.append(f"{max(row['peak'] for row in own) // MIB} of {own[0]['budget'] // MIB}")
        lines.append(f"| {vocabulary:,} | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 151_936, 262_144])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokenizers", type=Path, nargs="*", default=[], help="a tokenizer.json for each vocabulary")
    parser.add_argument("--ram", default="3GiB")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of prompts")
    parser.add_argument("--output", type=Path, help="rows as JSON lines")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for number, vocabulary in enumerate(options.vocabularies):
        tokenizer = options.tokenizers[number] if number < len(options.tokenizers) else None
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(vocabulary, tokenizer, Path(folder))
            for dtype in options.dtypes:
                rows = measure(model, dtype, options.ram, vocabulary, options.scale)
                found += rows
                if options.output is not None:
                    with options.output.open("a") as file:
                        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(_table(found))


if __name__ == "__main__":
    main()

"""llama.cpp with weights of 16, 8 and 4 bits, on the same tokens; each against its own run in 16 bits."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.peers.commands import run_command
from benchmarks.peers.environments import python_of
from benchmarks.quality.figures import Scored
from benchmarks.quality.task import Task

# kinds of `benchmarks.peers.quantise_llama_cpp`; the first is what the others are held against
KINDS = {
    "bf16": "llama.cpp, bfloat16",
    "q8_0": "llama.cpp, Q8_0",
    "q4_0": "llama.cpp, Q4_0",
    "q4_0-layers": "llama.cpp, Q4_0, embeddings and output in bfloat16",
    "q4_k_m": "llama.cpp, Q4_K_M",
    "q4_k_m-layers": "llama.cpp, Q4_K_M, embeddings and output in bfloat16",
}
REFERENCE = "bf16"


def measure(
    model: str, kinds: list[str], task: Task, answers: list[list[int]], cache: Path
) -> Iterator[tuple[str, Scored | None, str]]:
    """For each kind, the reference first, what it said, or why it said nothing.

    Raises:
        RuntimeError: llama.cpp cannot be installed, or does not serve this model.
    """
    python = str(python_of("llama-cpp", cache))
    with tempfile.TemporaryDirectory(prefix="quality-", dir=cache) as name:
        folder = Path(name)
        whole = folder / "bf16.gguf"
        run_command([python, "-m", "benchmarks.peers.convert_llama_cpp", str(Path(model).resolve()), str(whole)])
        for kind in [REFERENCE, *(kind for kind in kinds if kind != REFERENCE)]:
            try:
                yield kind, _measure(python, kind, whole, folder, task, answers), ""
            except RuntimeError as error:
                yield kind, None, str(error)


def _measure(python: str, kind: str, whole: Path, folder: Path, task: Task, answers: list[list[int]]) -> Scored:
    file = whole
    if kind != REFERENCE:
        file = folder / "quantised.gguf"
        run_command([python, "-m", "benchmarks.peers.quantise_llama_cpp", str(whole), str(file), kind])
    answered = [[*prompt, *answer] for prompt, answer in zip(task.prompts, answers, strict=True)]
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps({"model": str(file), "sequences": [*task.windows, *answered]}), encoding="utf-8")
    run_command([python, "-m", "benchmarks.quality.run_llama_cpp", str(job), str(result)])
    told = json.loads(result.read_text(encoding="utf-8"))
    count = len(task.windows)
    starts = [len(prompt) - 1 for prompt in task.prompts]
    forced = [row[start:] for row, start in zip(told["logprobs"][count:], starts, strict=True)]
    likeliest = [row[start:] for row, start in zip(told["likeliest"][count:], starts, strict=True)]
    return Scored(told["logprobs"][:count], forced, likeliest, None)

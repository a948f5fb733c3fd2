"""Transformers' `generate` in static batches; with option `offload`, Accelerate keeps weights on disk.

Options: batch (prompts at once), sort (1: batches of similar lengths), dtype, cpu_mib (weights kept in memory; 0: all).
"""

from __future__ import annotations

import collections
import time

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.peers.job import Job, Measurement, serve

PAD = 1


class Progress(StoppingCriteria):
    """Never stops; reports each step's tokens."""

    def __init__(self, job: Job) -> None:
        self.job, self.tokens = job, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: object) -> torch.BoolTensor:
        self.tokens += len(input_ids)
        self.job.report_progress(self.tokens)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def measure(job: Job) -> Measurement:
    torch.set_num_threads(job.num_threads)
    model = load(job)
    model.generation_config.eos_token_id = None
    if not job.options.get("cpu_mib"):
        generate(model, [[5, 6, 7]] * 2, 2)
    order = list(range(len(job.prompts)))
    if job.options.get("sort"):
        order.sort(key=lambda i: len(job.prompts[i]), reverse=True)
    size, tokens, progress = int(job.options["batch"]), {}, Progress(job)
    job.report_progress(0)
    start = time.perf_counter()
    for begin in range(0, len(order), size):
        batch = order[begin : begin + size]
        rows = generate(model, [job.prompts[i] for i in batch], job.max_tokens, progress)
        tokens.update(zip(batch, rows, strict=True))
    seconds = time.perf_counter() - start
    placed = collections.Counter(map(str, getattr(model, "hf_device_map", {}).values()))
    note = ", ".join(f"{count} modules on {device}" for device, count in placed.items())
    return Measurement(seconds, [tokens[i] for i in range(len(order))], note)


def load(job: Job) -> torch.nn.Module:
    dtype = getattr(torch, str(job.options.get("dtype", "bfloat16")))
    offload: dict[str, object] = {}
    if "cpu_mib" in job.options:
        memory = {"cpu": f"{job.options['cpu_mib']}MiB"}
        offload = {"device_map": "auto", "max_memory": memory, "offload_folder": f"{job.progress_file}-offload"}
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, **offload).eval()


def generate(
    model: torch.nn.Module, prompts: list[list[int]], max_tokens: int, progress: Progress | None = None
) -> list[list[int]]:
    """A batch, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=PAD,
        stopping_criteria=StoppingCriteriaList([progress] if progress else []),
    )
    rows: list[list[int]] = output[:, longest:].tolist()
    return rows


if __name__ == "__main__":
    serve(measure)

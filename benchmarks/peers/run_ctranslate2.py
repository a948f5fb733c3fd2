"""CTranslate2; options: batch (prompts at once, 0: all), compute_type. Runs in its own environment."""

from __future__ import annotations

import time

import ctranslate2

from benchmarks.peers.job import Job, Measurement, serve


def measure(job: Job) -> Measurement:
    kind = str(job.options.get("compute_type", "default"))
    generator = ctranslate2.Generator(job.model, "cpu", compute_type=kind, intra_threads=job.num_threads)
    generate(generator, [[5, 6, 7]] * 2, 2, 0)
    start = time.perf_counter()
    tokens = generate(generator, job.prompts, job.max_tokens, int(job.options["batch"]))
    return Measurement(time.perf_counter() - start, tokens, f"computes in {generator.compute_type}")


def generate(
    generator: ctranslate2.Generator, prompts: list[list[int]], max_tokens: int, batch: int
) -> list[list[int]]:
    results = generator.generate_batch(
        [[f"t{token}" for token in prompt] for prompt in prompts],
        max_batch_size=batch,
        max_length=max_tokens,
        min_length=max_tokens,
        include_prompt_in_result=False,
        end_token=[],
        sampling_topk=1,
    )
    return [list(result.sequences_ids[0]) for result in results]


if __name__ == "__main__":
    serve(measure)

"""OpenVINO GenAI with continuous batching, all prompts submitted at once; runs in its own environment.

Options: batched_tokens (most of a step), cache_gb, sequences (most at once), split_fuse (0: prompts in one piece),
kv (type of the KV cache; u8 by default), prefix_caching, precision (bf16 by default; with f32, rows that meet weights
in few bits are rounded to 8 bits, "dynamic quantization").
"""

from __future__ import annotations

import time

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peers.job import Job, Measurement, serve


def measure(job: Job) -> Measurement:
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = int(job.options["cache_gb"])
    scheduler.max_num_batched_tokens = int(job.options["batched_tokens"])
    scheduler.max_num_seqs = int(job.options.get("sequences", 256))
    scheduler.dynamic_split_fuse = bool(job.options.get("split_fuse", 1))
    scheduler.enable_prefix_caching = bool(job.options.get("prefix_caching", 0))
    precision = str(job.options.get("precision", "bf16"))
    properties = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": job.num_threads}
    if precision == "f32":
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 128
    if "kv" in job.options:
        properties["KV_CACHE_PRECISION"] = str(job.options["kv"])
    pipe = genai.ContinuousBatchingPipeline(job.model, scheduler, "CPU", properties)
    generate(pipe, [[5, 6, 7]] * 2, 2)
    start = time.perf_counter()
    tokens = generate(pipe, job.prompts, job.max_tokens)
    seconds = time.perf_counter() - start
    return Measurement(seconds, tokens, f"cache use at most {pipe.get_metrics().max_cache_usage:.0f} %")


def generate(pipe: genai.ContinuousBatchingPipeline, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    config = genai.GenerationConfig()
    config.max_new_tokens = max_tokens
    config.ignore_eos = True
    config.do_sample = False
    inputs = [ov.Tensor(np.array([ids], np.int64)) for ids in prompts]
    results = pipe.generate(inputs, [config] * len(inputs))
    return [list(result.m_generation_ids[0]) for result in results]


if __name__ == "__main__":
    serve(measure)

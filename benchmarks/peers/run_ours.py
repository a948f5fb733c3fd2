"""flexgen-lite; every option is a key of its configuration."""

from __future__ import annotations

import sys
import time
from typing import Any

from benchmarks.peers.job import Job, Measurement, serve
from flexgen_lite import FlexGenLite, SamplingParams


def measure(job: Job) -> Measurement:
    options: dict[str, Any] = {**({"ram": job.memory_bytes} if job.memory_bytes else {}), **job.options}
    with FlexGenLite(job.model, **options) as model:
        print(model.plan, file=sys.stderr)
        model.generate([[5, 6, 7]], greedy(2))
        before = model.status().totals
        start = time.perf_counter()
        outputs = model.generate(job.prompts, greedy(job.max_tokens))
        seconds = time.perf_counter() - start
        status = model.status()
    lanes = {key: status.totals[key] - before.get(key, 0.0) for key in status.totals if key.endswith("_seconds")}
    parts = [f"{key.removesuffix('_seconds')} {value:.1f} s" for key, value in lanes.items()]
    parts.append(f"peak as it counts itself {status.memory['peak'] / 2**30:.2f} GiB")
    errors = {output.error for output in outputs if output.error}
    if errors:
        raise RuntimeError("; ".join(sorted(errors)))
    return Measurement(seconds, [list(output.token_ids) for output in outputs], ", ".join(parts))


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


if __name__ == "__main__":
    serve(measure)

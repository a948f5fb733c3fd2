"""Attention of prompts on this CPU: our kernel beside PyTorch's, in bfloat16 and float32.

    python -m benchmarks.prefill_attention [--threads N] [--repeats N]

Rates are causal GFLOP per second: 2 T^2 (D + E) / 2 per head for a prompt of T tokens. A round goes through all the
contestants; the median of the rounds counts.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from flexgen_lite.workers.compute.attention_call import AttentionCall
from flexgen_lite.workers.compute.prefill_attention import prompt_attention

TOTAL_TOKENS = 4096
HEADS = {"32 heads of 64": (32, 32, 64), "32 heads / 4 KV heads of 64": (32, 4, 64), "32 heads / 8 KV heads of 128": (32, 8, 128)}  # fmt: skip # noqa: E501
LENGTHS = (64, 256, 512, 1024, 2048)


def contestants(
    heads: int, kv_heads: int, dim: int, tokens: int, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    prompts = TOTAL_TOKENS // tokens
    q, k, v = (torch.randn(1, TOTAL_TOKENS, n, dim).to(dtype).transpose(1, 2) for n in (heads, kv_heads, kv_heads))
    call = AttentionCall(q, k, v, dim**-0.5, None, None, None)
    spans = [(i * tokens, tokens) for i in range(prompts)]
    out_THE = torch.empty(TOTAL_TOKENS, heads, dim, dtype=dtype)
    batched = [x.reshape(x.shape[1], prompts, tokens, dim).transpose(0, 1).contiguous() for x in (q, k, v)]
    gqa = heads != kv_heads
    return {
        "ours": lambda: prompt_attention(call, spans, out_THE),
        "torch": lambda: scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=gqa),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}")
    print(f"{'':32}{'prompt':>8}{'dtype':>10}{'ours':>8}{'torch':>8}   GFLOP/s")
    for title, (heads, kv_heads, dim) in HEADS.items():
        for dtype in (torch.bfloat16, torch.float32):
            for tokens in LENGTHS:
                flops = 2 * TOTAL_TOKENS * tokens * dim * heads
                calls = contestants(heads, kv_heads, dim, tokens, dtype)
                seconds: dict[str, list[float]] = {name: [] for name in calls}
                for i in range(-1, args.repeats):
                    for name, call in calls.items():
                        start = time.perf_counter()
                        call()
                        if i >= 0:
                            seconds[name].append(time.perf_counter() - start)
                ours, theirs = (flops / statistics.median(seconds[name]) / 1e9 for name in ("ours", "torch"))
                name = str(dtype).removeprefix("torch.")
                print(f"{title:32}{tokens:8}{name:>10}{ours:8.0f}{theirs:8.0f}{ours / theirs:8.1f} x", flush=True)


if __name__ == "__main__":
    main()

"""Decode attention on this CPU: the kernels, PyTorch's own, and how fast memory can be read at all.

    python benchmarks/attention.py [--threads N] [--repeats N]

Multi-head latent attention, with the widths of DeepSeek V3, is limited by operations: milliseconds of a step to
latents, by the kernels and by PyTorch's products, and of one to the keys and values of all heads.

Rates are gigabytes of K and V read per second, in the storage dtype; "bfloat16, int8" are queries in bfloat16 and KV in
8 bits. A round goes through all the
contestants, so that what else the machine does meets them alike; the median of the rounds counts. Each pass
reads another part of the cache, beyond the reach of the processor's caches.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # as in the workers: threads that wait do not compete with those that work

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import njit, prange

from flexgen_lite.memory import exchange, kv_layout
from flexgen_lite.memory.arena import Arena, map_arena
from flexgen_lite.model.spec import ITEM_BYTES, AttentionSpec
from flexgen_lite.wire.arena_specs import ExchangeSpec, KvGroup, PageRun
from flexgen_lite.wire.worker_messages import AttachAttention, Attend, BeginAttention, KvBatch, KvSpan
from flexgen_lite.workers.attention.state import AttentionState

Contestants = dict[str, tuple[Callable[[int], object], int]]  # what to call with a round's number, and bytes it reads

PAGE_TOKENS = 16
BUFFER_BYTES = 512 << 20
HEADS, LATENT, ROTARY = 128, 512, 64  # DeepSeek V3's
LATENT_CASES = ((16, 512), (4, 2048))  # sequences, tokens
CASES = {
    "batch 16, 32 heads, 512 tokens, head_dim 64": (16, 32, 32, 512, 64),
    "batch 16, 32 heads / 4 KV heads, 2048 tokens, head_dim 128": (16, 32, 4, 2048, 128),
}


@njit(parallel=True, fastmath=True, cache=True)
def parallel_sum(parts):  # type: ignore[no-untyped-def]
    """Sum of int64 `[threads, n]`, eight vectors at a time."""
    total = 0
    for t in prange(len(parts)):
        part = 0
        for x in parts[t]:
            part += x
        total += part
    return total


def kernel_contestant(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int, dtype: str, threads: int, kv_dtype: str | None = None
) -> tuple[Callable[[int], object], int]:
    """One decode step of `batch` sequences of `tokens` tokens; the rounds go through the layers."""
    spec = AttentionSpec(heads, kv_heads, dim, dim, dim**-0.5, None, None, False)
    return attention_contestant(spec, batch, tokens, dtype, threads, kv_dtype)


def attention_contestant(
    spec: AttentionSpec, batch: int, tokens: int, dtype: str, threads: int, kv_dtype: str | None = None
) -> tuple[Callable[[int], object], int]:
    """`kv_dtype`: of the cache, where it is not `dtype`."""
    kv_dtype, pages = kv_dtype or dtype, -(-tokens // PAGE_TOKENS)
    one = batch * pages * kv_layout.page_bytes([spec], PAGE_TOKENS, kv_dtype)
    layers = [spec] * max(1, -(-BUFFER_BYTES // one))
    group = KvGroup(tuple(range(len(layers))), PAGE_TOKENS)
    kv = kv_layout.kv_spec(layers, range(len(layers)), [group], batch * pages, kv_dtype)
    region = exchange.region_bytes(layers, batch, ITEM_BYTES[dtype])
    arena = Arena("kv")
    arena.resize(kv.arena_bytes)
    memory = map_arena(arena.fd, kv.arena_bytes)
    np.frombuffer(memory, np.uint16)[:] = 0x3C3C
    attach = AttachAttention(
        tuple(layers), tuple(range(len(layers))), ExchangeSpec(1, region, batch, dtype), kv, threads, ()
    )
    state = AttentionState(attach, memory, memoryview(bytearray(region)))
    order = np.random.default_rng(0).permutation(batch * pages).reshape(batch, pages)
    spans = tuple(KvSpan(b, 1, tokens - 1, True, (PageRun(0, tuple(map(int, order[b]))),)) for b in range(batch))
    state.begin(BeginAttention(0, threads, (KvBatch(0, 0, spans),)))
    read = batch * tokens * kv_layout.page_bytes([spec], 1, kv_dtype)
    return lambda i: state.attend(Attend(0, i % len(layers), 0)), read


def torch_latents(batch: int, tokens: int) -> tuple[Callable[[int], object], int]:
    """Two products and a softmax a sequence."""
    cache = torch.full((8, batch, tokens, LATENT + ROTARY), 0.01, dtype=torch.bfloat16)
    query = torch.full((batch, HEADS, LATENT + ROTARY), 0.01, dtype=torch.bfloat16)

    def step(i: int) -> Any:
        keys = cache[i % len(cache)]
        weights = torch.softmax(torch.matmul(query, keys.transpose(1, 2)).float() * 0.07, dim=-1)
        return torch.matmul(weights.to(torch.bfloat16), keys[..., :LATENT])

    return step, cache[0].nbytes


def torch_contestant(
    batch: int, heads: int, kv_heads: int, tokens: int, dim: int, dtype: torch.dtype
) -> tuple[Callable[[int], object], int]:
    one = 2 * batch * kv_heads * tokens * dim * dtype.itemsize
    shape = (max(1, -(-BUFFER_BYTES // one)), 2, batch, kv_heads, tokens, dim)
    cache = torch.full(shape, 0.01, dtype=dtype)
    query = torch.full((batch, heads, 1, dim), 0.01, dtype=dtype)

    def step(i: int) -> Any:
        k, v = cache[i % len(cache)]
        return torch.nn.functional.scaled_dot_product_attention(query, k, v, enable_gqa=heads != kv_heads)

    return step, one


def measure(contestants: Contestants, repeats: int) -> dict[str, float]:
    """GB/s of each."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(-1, repeats):  # the first round warms up
        for name, (call, _) in contestants.items():
            start = time.perf_counter()
            call(i + 1)
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: contestants[name][1] / statistics.median(times) / 1e9 for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    numba.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}")
    buffer = np.ones((args.threads, BUFFER_BYTES // 8 // args.threads), np.int64)
    for title, shape in CASES.items():
        contestants: Contestants = {"DRAM read": (lambda _: parallel_sum(buffer), buffer.nbytes)}
        for name in ("float32", "bfloat16"):
            contestants[f"torch sdpa {name}"] = torch_contestant(*shape, getattr(torch, name))
        for name in ("float32", "bfloat16", "float16"):
            contestants[f"flexgen-lite {name}"] = kernel_contestant(*shape, name, args.threads)
        for name in ("float32", "bfloat16"):
            contestants[f"flexgen-lite {name}, int8"] = kernel_contestant(*shape, name, args.threads, "int8")
        rates = measure(contestants, args.repeats)
        seconds = {name: contestants[name][1] / rate / 1e9 for name, rate in rates.items()}
        print(f"\n{title}\n{'':28}  GB/s  of DRAM read     ms  time of flexgen-lite bfloat16")
        for name, rate in rates.items():
            line = f"{name:28}{rate:6.1f}{rate / rates['DRAM read']:13.0%}"
            if name != "DRAM read":
                line += f"{1e3 * seconds[name]:9.2f}{seconds[name] / seconds['flexgen-lite bfloat16']:20.0%}"
            print(line)
    for batch, tokens in LATENT_CASES:
        compare_latents(batch, tokens, args.threads, args.repeats)


def compare_latents(batch: int, tokens: int, threads: int, repeats: int) -> None:
    spec = AttentionSpec(HEADS, 1, LATENT + ROTARY, LATENT, 0.07, None, None, False, values_in_keys=True)
    contestants: Contestants = {
        f"flexgen-lite {name}": attention_contestant(spec, batch, tokens, name, threads)
        for name in ("float32", "bfloat16")
    }
    contestants["flexgen-lite int8"] = attention_contestant(spec, batch, tokens, "bfloat16", threads, "int8")
    contestants["torch products bfloat16"] = torch_latents(batch, tokens)
    contestants["torch sdpa, all heads"] = torch_contestant(batch, HEADS, HEADS, tokens, 160, torch.bfloat16)
    rates = measure(contestants, repeats)
    operations = 2 * batch * tokens * HEADS * (2 * LATENT + ROTARY)
    print(f"\nlatents: batch {batch}, {HEADS} heads, {tokens} tokens\n{'':24}    ms   MB  GFLOP/s")
    for name, rate in rates.items():
        size = contestants[name][1]
        seconds = size / rate / 1e9
        work = f"{operations / seconds / 1e9:9.0f}" if "all heads" not in name else ""
        print(f"{name:24}{1e3 * seconds:6.1f}{size / 1e6:5.0f}{work}")


if __name__ == "__main__":
    main()

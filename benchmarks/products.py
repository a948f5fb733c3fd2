"""Products of few rows with weights in RAM on this CPU: our kernel, oneDNN with packed weights, F.linear.

    python -m benchmarks.products [--threads N] [--seconds N] [--rows 1,4,16] [--shapes 2048x2048,...]

bfloat16, shapes are N x K. Each call takes another weight, of WEIGHT_BYTES in all, as the layers of a model do. A round
goes through all the contestants, so that what else the machine does meets them alike, and each takes a weight that none
has read for long; the median of the rounds counts.
GB/s are of weights, beside the rate at which memory can be read at all.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # as in the workers

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from flexgen_lite.workers.compute.product_weights import packed_weight

WEIGHT_BYTES = 512 << 20
SHAPES = ("6144x2048", "2048x2048", "8192x2048", "2048x8192", "5632x2048", "50272x2048")
ROWS = "1,2,4,6,8,12,16,24,32,48,64"

Contestants = dict[str, Callable[[int], object]]  # what to call with a round's number


def weights_of(columns: int, width: int) -> tuple[list[torch.Tensor], list[Any]]:
    """The same weights row by row and packed."""
    count = max(2, -(-WEIGHT_BYTES // (columns * width * 2)))
    first = torch.randn(columns, width).bfloat16()
    plain = [first.clone() for _ in range(count)]
    return plain, [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in plain]


def contestants(plain: list[torch.Tensor], packed: list[Any], rows: int) -> Contestants:
    ops: Any = torch.ops.mkldnn
    ours = [packed_weight(ops.data_ptr(weight), ops._nbytes(weight), weight.shape) for weight in packed]
    x = torch.randn(rows, plain[0].shape[1]).bfloat16()
    calls: Contestants = {}
    if (kernel := ours[0]) is not None:
        calls["ours"] = lambda i: (ours[i % len(ours)] or kernel).multiply(x, None)
    apart = len(packed) // 2  # or the second would find in the cache what the first has read
    calls["oneDNN"] = lambda i: ops._linear_pointwise.default(
        x, packed[(i + apart) % len(packed)], None, "none", [], ""
    )
    calls["F.linear"] = lambda i: linear(x, plain[i % len(plain)])
    return calls


def seconds_per_call(calls: Contestants, seconds: float) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end, i = time.perf_counter() + seconds, -1
    while i < 5 or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call(i)
            if i >= 0:
                taken[name].append(time.perf_counter() - start)
        i += 1
    return {name: statistics.median(times) for name, times in taken.items()}


def read_rate(repeats: int = 7) -> float:
    """Bytes of RAM read per second, by a sum."""
    buffer = torch.ones(WEIGHT_BYTES // 8, dtype=torch.int64)
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        buffer.sum()
        taken.append(time.perf_counter() - start)
    return WEIGHT_BYTES / statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line")
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}")
    print(f"memory is read at {read_rate() / 1e9:.1f} GB/s")
    print(f"{'N x K':>12}{'rows':>6}   {'ours':^16}{'oneDNN':^16}{'F.linear':^16}  ours / oneDNN")
    for shape in args.shapes.split(","):
        columns, width = map(int, shape.split("x"))
        plain, packed = weights_of(columns, width)
        for rows in map(int, args.rows.split(",")):
            times = seconds_per_call(contestants(plain, packed, rows), args.seconds)
            flops, size = 2e-9 * rows * columns * width, 2e-9 * columns * width
            cells = [f"{flops / t:5.0f} G {size / t:4.1f} GB" if t else "" for t in map(times.get, ("ours", "oneDNN", "F.linear"))]  # fmt: skip # noqa: E501
            ratio = f"{times['oneDNN'] / times['ours']:.2f}" if "ours" in times else ""
            print(f"{shape:>12}{rows:>6}   " + "".join(f"{cell:16}" for cell in cells) + f"  {ratio}", flush=True)


if __name__ == "__main__":
    main()

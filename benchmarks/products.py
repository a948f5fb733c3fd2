"""Products with weights in RAM on this CPU: our kernels, in bfloat16 and with weights in few bits, oneDNN, F.linear.

    python -m benchmarks.products [--threads N] [--seconds N] [--rows 1,4,16] [--shapes 2048x2048,...]

Shapes are N x K. "int8" and "int4" are weights in groups of 128 and 32, multiplied in bfloat16, as are "fp8" (E4M3),
"mxfp4", "nvfp4", "nf4" and "q4_k" in groups of 128, 32, 16, 64 and 32; "w8a8" and "w4a8" are multiplied with rows in
8 bits; the other
contestants are bfloat16, with weights in panels where they are ours. Each call takes another weight, of WEIGHT_BYTES
in all, as the layers of a model do. A round goes through all the contestants, so that what else the machine does meets
them alike, and each takes a weight that none has read for long; the median of the rounds counts.
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

from benchmarks.rounds import seconds_per_call
from flexgen_lite.model.packing import Packing
from flexgen_lite.workers.compute.product_weights import Weights, weights_in_rows, weights_of_bits

WEIGHT_BYTES = 512 << 20
SHAPES = ("6144x2048", "2048x2048", "8192x2048", "2048x8192", "5632x2048", "50272x2048")
ROWS = "1,2,4,8,16,32,64,256,1024"
KINDS = {
    "int8": Packing(8, 128, "bfloat16", "bfloat16"),
    "int4": Packing(4, 32, "bfloat16", "bfloat16", zeros="uint8"),
    "fp8": Packing(8, 128, "bfloat16", "float32", kind="e4m3"),
    "mxfp4": Packing(4, 32, "bfloat16", "float8_e8m0fnu", kind="e2m1"),
    "nvfp4": Packing(
        4, 16, "bfloat16", "float8_e4m3fn", kind="e2m1", factors="float32", factor_group=2048, divides=True
    ),
    "q4_k": Packing(4, 32, "bfloat16", "uint8", zeros="scaled", kind="uint", factors="float16", factor_group=256),
    "nf4": Packing(4, 64, "bfloat16", "float32", kind="nf4"),
    "w8a8": Packing(8, 128, "int8", "bfloat16", rounds_rows=True),
    "w4a8": Packing(4, 32, "int8", "bfloat16", zeros="uint8", rounds_rows=True),
}
NAMES = ("ours", *KINDS, "oneDNN", "F.linear")

Contestants = dict[str, Callable[[int], object]]  # what to call with a round's number


class Contest:
    """Weights of one shape in all their forms."""

    def __init__(self, columns: int, width: int) -> None:
        self._width = width
        count = max(2, -(-WEIGHT_BYTES // (columns * width * 2)))
        first = torch.randn(columns, width).bfloat16()
        self._plain = [first.clone() for _ in range(count)]
        self._by_onednn: list[Any] = [torch.ops.mkldnn._reorder_linear_weight(weight) for weight in self._plain]
        self._memory = [first.clone() for _ in range(count)]
        rows = [weights_in_rows(weight) for weight in self._memory]
        self._ours = {"ours": [weight.pack() for weight in rows if weight is not None and columns % 64 == 0]}
        for name, packing in KINDS.items():
            self._ours[name] = self._of_bits(packing, (columns, width), count)

    def _of_bits(self, packing: Packing, shape: tuple[int, int], count: int) -> list[Weights]:
        found = []
        for _ in range(count * 16 // packing.bits):
            memory = torch.randint(0, 256, (packing.num_bytes(shape),), dtype=torch.uint8)
            _fill(memory[packing.scales_at(shape) : packing.zeros_at(shape)], packing.scale_dtype)
            if packing.factors:
                _fill(memory[packing.factors_at(shape) :], packing.factors)
            self._memory.append(memory)
            weight = weights_of_bits(memory, packing, shape)
            found += [weight] if weight is not None else []
        return found

    def contestants(self, rows: int) -> Contestants:
        ops: Any = torch.ops.mkldnn
        x = torch.randn(rows, self._width).bfloat16()
        calls: Contestants = {
            name: lambda i, weights=weights: weights[i % len(weights)].multiply(x, None)  # type: ignore[misc]
            for name, weights in self._ours.items()
            if weights
        }
        apart = len(self._plain) // 2  # or the second would find in the cache what the first has read
        calls["oneDNN"] = lambda i: ops._linear_pointwise.default(
            x, self._by_onednn[(i + apart) % len(self._by_onednn)], None, "none", [], ""
        )
        calls["F.linear"] = lambda i: linear(x, self._plain[i % len(self._plain)])
        return calls


def _fill(numbers: torch.Tensor, dtype: str) -> None:
    if dtype in ("float32", "bfloat16", "float16"):
        numbers.view(getattr(torch, dtype)).fill_(0.01)
    else:
        numbers.fill_(56)  # of E4M3, 1; powers of two are small


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
    print("milliseconds, and GFLOP/s")
    print(f"{'N x K':>12}{'rows':>6}  " + "".join(f"{name:^16}" for name in NAMES))
    for shape in args.shapes.split(","):
        columns, width = map(int, shape.split("x"))
        contest = Contest(columns, width)
        for rows in map(int, args.rows.split(",")):
            times = seconds_per_call(contest.contestants(rows), args.seconds)
            flops = 2e-9 * rows * columns * width
            cells = [f"{t * 1e3:7.2f} {flops / t:5.0f} G" if t else "" for t in map(times.get, NAMES)]
            print(f"{shape:>12}{rows:>6}  " + "".join(f"{cell:16}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()

"""What stands between a layer's products, of Llama's kind in bfloat16: ours in one pass beside Transformers' own code.

    python -m benchmarks.fused [--threads N] [--seconds S] [--rows 16,64,2048] [--hidden 2048] [--intermediate 5632]

Microseconds a call, the median of rounds that go through all contestants, and how many times as fast ours are.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # as in the workers
os.environ["GOMP_SPINCOUNT"] = "2000"

import argparse
import platform
from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama import modeling_llama

from benchmarks.rounds import seconds_per_call
from flexgen_lite.workers.compute.fused import fuse

HEADS, HEAD_DIM = 32, 64
Call = Callable[[int], object]


def contestants(rows: int, hidden: int, intermediate: int) -> dict[str, tuple[Call, Call]]:
    """Ours and Transformers' of each part."""

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16()

    x, gate, up = drawn(1, rows, hidden), drawn(1, rows, intermediate), drawn(1, rows, intermediate)
    query = drawn(1, rows, HEADS, HEAD_DIM).transpose(1, 2)
    turn = (query, query[:, : HEADS // 8], drawn(1, rows, HEAD_DIM), drawn(1, rows, HEAD_DIM))
    norms = [modeling_llama.LlamaRMSNorm(hidden).bfloat16() for _ in range(2)]
    activations = [ACT2FN["silu"] for _ in range(2)]
    rotate = modeling_llama.apply_rotary_pos_emb
    fuse(nn.ModuleList([norms[0], activations[0]]), torch.bfloat16, torch.device("cpu"))
    fused_rotate = modeling_llama.apply_rotary_pos_emb
    modeling_llama.apply_rotary_pos_emb = rotate
    return {
        "norm": (lambda _: norms[0](x), lambda _: norms[1](x)),
        "gate": (lambda _: activations[0](gate) * up, lambda _: activations[1](gate) * up),
        "rotary": (lambda _: fused_rotate(*turn), lambda _: rotate(*turn)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rows", default="1,16,64,2048")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5632)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}")
    print(f"{'rows':>6}{'':10}{'ours':>10}{'theirs':>10}   us")
    for rows in map(int, args.rows.split(",")):
        with torch.inference_mode():
            for name, (ours, theirs) in contestants(rows, args.hidden, args.intermediate).items():
                seconds = seconds_per_call({"ours": ours, "theirs": theirs}, args.seconds)
                us, of_theirs = 1e6 * seconds["ours"], 1e6 * seconds["theirs"]
                print(f"{rows:6} {name:9}{us:10.0f}{of_theirs:10.0f}{of_theirs / us:8.1f} x", flush=True)


if __name__ == "__main__":
    main()

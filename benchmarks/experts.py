"""A layer's experts on this CPU: ours, dense products of as many rows, and Transformers' own forward.

    python -m benchmarks.experts [--threads N] [--tokens 1,64,1024] [--shapes 64x2048x1024,...] [--seconds N]

bfloat16; shapes are experts x hidden x inner size, 8 experts for each token, chosen at random. "dense" is our kernel on
the three products of a dense layer with as many rows as an expert has on average, times the experts that are used: what
could be had at best. Each call takes another layer's weights, more than the caches hold; the median of the rounds
counts.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # as in the workers

import argparse
from typing import Any

import torch
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from benchmarks.rounds import seconds_per_call
from flexgen_lite.workers.compute import experts
from flexgen_lite.workers.compute.product_weights import Weights, weights_in_rows
from flexgen_lite.workers.compute.products import Products
from flexgen_lite.workers.model.builder import EXPERTS_NAME

SHAPES = "64x2048x1024,128x2048x768"  # OLMoE, Qwen3-30B-A3B
TOKENS = "1,16,64,256,1024,4096"
TOP_K, LAYERS = 8, 2


def layers_of(num_experts: int, hidden: int, inner: int, implementation: str | None) -> list[Any]:
    """Experts of some layers; packed where the implementation is ours."""
    config: Any = OlmoeConfig(hidden_size=hidden, intermediate_size=inner, num_experts=num_experts)
    config._experts_implementation = implementation
    layers = []
    for _ in range(LAYERS):
        with torch.device("meta"):
            module = OlmoeExperts(config)
        module = module.to_empty(device="cpu").bfloat16()
        for parameter in module.parameters():
            parameter.data.normal_(0, 0.02)
        if implementation == EXPERTS_NAME:
            Products(module, torch.bfloat16, torch.device("cpu")).pack(module.modules())
        layers.append(module)
    return layers


def dense_of(hidden: int, inner: int, count: int) -> list[tuple[Weights, Weights, torch.Tensor]]:
    """The products of `count` dense layers of an expert's size, and the memory that they lie in."""
    found = []
    for _ in range(count):
        memory = torch.randn(3 * inner, hidden).bfloat16()
        up = weights_in_rows(memory[: 2 * inner])
        down = weights_in_rows(memory[2 * inner :].view(hidden, inner))
        assert up is not None and down is not None, "this processor has no kernel of ours"
        found.append((up.pack(), down.pack(), memory))
    return found


def measure(layers: dict[str, list[Any]], dense: list[Any], tokens: int, seconds: float) -> str:
    """A line of the table."""
    module = layers["ours"][0]
    num_experts, hidden, inner = module.num_experts, module.hidden_dim, module.intermediate_dim
    x = torch.randn(tokens, hidden).bfloat16()
    chosen = torch.stack([torch.randperm(num_experts)[:TOP_K] for _ in range(tokens)])
    share = torch.rand(tokens, TOP_K).softmax(-1).bfloat16()
    used = len(torch.unique(chosen))
    rows = max(1, round(tokens * TOP_K / used))
    part = torch.randn(rows, hidden).bfloat16()

    def of_dense(i: int) -> None:
        for up, down, _ in dense[:used]:
            down.multiply(up.multiply(part, None)[:, : down.width].contiguous(), None)

    times = seconds_per_call(
        {
            "ours": lambda i: layers["ours"][i % LAYERS](x, chosen, share),
            "dense": of_dense,
            "theirs": lambda i: layers["theirs"][i % LAYERS](x, chosen, share),
        },
        seconds,
        least=3,
    )
    ours, best, theirs = times["ours"], times["dense"], times["theirs"]
    flops, size = 6e-9 * tokens * TOP_K * hidden * inner, 6e-9 * used * hidden * inner
    shape = f"{num_experts}x{hidden}x{inner}"
    rates = f"{flops / ours:7.0f} G {size / ours:5.1f} GB/s{flops / best:9.0f} G{flops / theirs:9.0f} G"
    return f"{shape:>14}{tokens:>8}{rows:>7} {rates}{best / ours:10.2f}{theirs / ours:10.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line")
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--shapes", default=SHAPES)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    experts.register()
    print("         shape  tokens   rows    ours FLOP/s         dense  Transf.   / dense   / Transformers")
    for shape in args.shapes.split(","):
        num_experts, hidden, inner = map(int, shape.split("x"))
        layers = {
            "ours": layers_of(num_experts, hidden, inner, EXPERTS_NAME),
            "theirs": layers_of(num_experts, hidden, inner, "grouped_mm"),
        }
        dense = dense_of(hidden, inner, num_experts)
        for tokens in map(int, args.tokens.split(",")):
            print(measure(layers, dense, tokens, args.seconds), flush=True)


if __name__ == "__main__":
    main()

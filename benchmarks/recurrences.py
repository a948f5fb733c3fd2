"""Recurrences of hybrids on this CPU, at published widths: ours beside the functions of Transformers' classes.

    python -m benchmarks.recurrences [--threads N] [--seconds S] [--sequences 16,64] [--tokens 128,512]

Single tokens: one of each sequence, states (float32) read at one place and written to another. Prompts: one sequence.
Milliseconds a call, the median of rounds that go through both, and for single tokens GB/s of states read and written;
the last line is what a copy of as much memory reaches.
"""

from __future__ import annotations

import os

os.environ["OMP_WAIT_POLICY"] = "passive"  # as in the workers
os.environ["GOMP_SPINCOUNT"] = "2000"

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe as qwen

from benchmarks.rounds import seconds_per_call
from flexgen_lite.workers.compute import recurrences

Call = Callable[[torch.Tensor | None], object]
DELTA_KEY_HEADS, DELTA_HEADS, DELTA_SIZE = 16, 32, 128  # Qwen3.5-35B-A3B; Kimi-Linear-48B has 32 key heads
MAMBA_HEADS, MAMBA_ROWS, MAMBA_STATE = 128, 64, 128  # Granite 4 H Small


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def delta(function: Any, is_kimi: bool, sequences: int, tokens: int) -> Call:
    """A call with the states to begin with."""
    key_heads = DELTA_HEADS if is_kimi else DELTA_KEY_HEADS
    query, key = (drawn(sequences, tokens, key_heads, DELTA_SIZE) for _ in range(2))
    value, beta = drawn(sequences, tokens, DELTA_HEADS, DELTA_SIZE), drawn(sequences, tokens, DELTA_HEADS).sigmoid()
    decays = (sequences, tokens, DELTA_HEADS, DELTA_SIZE) if is_kimi else (sequences, tokens, DELTA_HEADS)
    options = {"g": -torch.rand(decays), "beta": beta, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return lambda states: function(query, key, value, initial_state=states, **options)


def mamba_step(function: Any, sequences: int) -> Call:
    hidden, inputs, outputs = (
        drawn(sequences, MAMBA_HEADS, MAMBA_ROWS),
        *(drawn(sequences, 1, MAMBA_STATE) for _ in range(2)),
    )
    steps = drawn(sequences, MAMBA_HEADS)[..., None].expand(-1, -1, MAMBA_ROWS)
    A = (-torch.rand(MAMBA_HEADS))[:, None, None].expand(-1, MAMBA_ROWS, MAMBA_STATE)
    skip, bias = (torch.randn(MAMBA_HEADS)[:, None].expand(-1, MAMBA_ROWS) for _ in range(2))
    return lambda states: function(
        states, hidden, steps, A, inputs, outputs, skip, z=None, dt_bias=bias, dt_softplus=True
    )


def mamba_prompt(function: Any, tokens: int) -> Call:
    hidden, steps = drawn(1, tokens, MAMBA_HEADS, MAMBA_ROWS), drawn(1, tokens, MAMBA_HEADS)
    inputs, outputs = (drawn(1, tokens, 1, MAMBA_STATE) for _ in range(2))
    options = {"D": torch.randn(MAMBA_HEADS), "dt_bias": torch.randn(MAMBA_HEADS), "dt_softplus": True}
    A = -torch.rand(MAMBA_HEADS)
    return lambda states: function(
        hidden, steps, A, inputs, outputs, 256, initial_states=states, return_final_states=True, **options
    )


def report(
    name: str, theirs: Call, ours: Call, states: torch.Tensor | None, marker: torch.Tensor | None, seconds: float
) -> None:
    """A line. `marker` stands for as many states, which ours read and write where they are."""
    times = seconds_per_call({"theirs": lambda _: theirs(states), "ours": lambda _: ours(marker)}, seconds)
    moved = "" if states is None else f"{2e-9 * states.nbytes / times['ours']:10.1f} GB/s"
    ratio = times["theirs"] / times["ours"]
    print(f"{name:<34}{times['theirs'] * 1e3:9.1f} ms{times['ours'] * 1e3:9.1f} ms{ratio:8.1f} x{moved}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=4.0, help="for each line")
    parser.add_argument("--sequences", default="16,64", help="of single tokens")
    parser.add_argument("--tokens", default="128,512", help="of prompts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    step, chunks = qwen.torch_recurrent_gated_delta_rule, qwen.torch_chunk_gated_delta_rule
    kimi_step, kimi_chunks = kimi.recurrent_kimi_delta_attention, kimi.chunk_kimi_delta_attention
    print(f"{'':<34}Transformers{'ours':>9}")
    for count in map(int, args.sequences.split(",")):
        for name, kind, function, sizes in (
            ("gated delta rule", recurrences.DeltaRule, step, (DELTA_HEADS, DELTA_SIZE, DELTA_SIZE)),
            ("KDA", recurrences.KimiDeltaRule, kimi_step, (DELTA_HEADS, DELTA_SIZE, DELTA_SIZE)),
            ("Mamba 2", recurrences.MambaStep, granite.mamba2_selective_state_update,
             (MAMBA_HEADS, MAMBA_ROWS, MAMBA_STATE)),
        ):  # fmt: skip
            arena = torch.randn(2 * count, *sizes)  # two places a sequence, as the engine has them
            even, odd = (torch.tensor([arena[i].data_ptr() for i in range(n, 2 * count, 2)]) for n in (0, 1))
            marker = recurrences.marked((count, *sizes), recurrences.StateInPlace(even, odd))
            theirs, ours = (
                mamba_step(call, count) if name == "Mamba 2" else delta(call, name == "KDA", count, 1)
                for call in (function, kind(function))
            )
            report(f"{name}, {count} single tokens", theirs, ours, arena[:count].clone(), marker, args.seconds)
    for tokens in map(int, args.tokens.split(",")):
        for name, kind, function in (
            ("gated delta rule", recurrences.DeltaRule, chunks),
            ("KDA", recurrences.KimiDeltaRule, kimi_chunks),
            ("Mamba 2", recurrences.MambaScan, granite.mamba2_chunk_scan),
        ):
            theirs, ours = (
                mamba_prompt(call, tokens) if name == "Mamba 2" else delta(call, name == "KDA", 1, tokens)
                for call in (function, kind(function))
            )
            report(f"{name}, prompt of {tokens}", theirs, ours, None, None, args.seconds)
    source, target = torch.randn(64 << 20), torch.empty(64 << 20)
    taken = seconds_per_call({"copy": lambda _: target.copy_(source)}, args.seconds)["copy"]
    print(f"a copy of memory {2e-9 * source.nbytes / taken:.1f} GB/s read and written")


if __name__ == "__main__":
    main()

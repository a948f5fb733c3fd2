"""Ours against Transformers' `generate`, side by side on one machine in one run.

    python -m benchmarks.against_transformers [--prompts 16] [--prompt-tokens 512] [--max-tokens 32] [--dtype float32]

The model has OPT-1.3B's shape and random weights (seed 0). Both get the same token ids, decode greedily and may not
stop early; loading is excluded on both sides. Transformers gets its best batch size among --batch-sizes. Prints tokens
per second (generated tokens over the seconds of prefill and decode), the ratio, and how many tokens agree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPE = {
    "hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
    "word_embed_proj_dim": 2048, "max_position_embeddings": 2048, "vocab_size": 50272,
}  # fmt: skip


def main() -> None:
    args = parse_arguments()
    folder = Path(args.model or tempfile.mkdtemp(prefix="flexgen-lite-bench-"))
    try:
        if args.model is None:
            in_a_process("make", args, folder)
        rows = [in_a_process("ours", args, folder)]
        rows += [in_a_process("theirs", args, folder, size) for size in args.batch_sizes]
    finally:
        if args.model is None:
            shutil.rmtree(folder)
    ours, best = rows[0], max(rows[1:], key=lambda row: row["tokens_per_second"])
    agree = sum(a == b for x, y in zip(ours["tokens"], best["tokens"], strict=True) for a, b in zip(x, y, strict=True))
    total = args.prompts * args.max_tokens
    print(
        f"\nOPT-1.3B shape, random weights, {args.dtype}; {args.prompts} prompts of {args.prompt_tokens}, "
        f"{args.max_tokens} generated; {os.cpu_count()} x {processor()}, commit {commit()}"
    )
    for row in rows:
        print(f"{row['name']:28} {row['seconds']:8.1f} s {row['tokens_per_second']:8.2f} tok/s")
    print(
        f"ours / Transformers at its best: {ours['tokens_per_second'] / best['tokens_per_second']:.2f} x; "
        f"{agree} of {total} tokens agree"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float32", help="float32 or bfloat16, for both sides")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16], help="of Transformers")
    parser.add_argument("--model", help="a model directory, instead of a new one with OPT-1.3B's shape")
    parser.add_argument("--step", choices=["make", "ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step is not None:
        step = {"make": make_model, "ours": run_ours, "theirs": run_theirs}[args.step]
        print(json.dumps(step(args)))
        sys.exit(0)
    return args


def in_a_process(step: str, args: argparse.Namespace, folder: Path, batch_size: int = 0) -> dict:
    """Each side in a fresh process, so that neither inherits the other's memory or threads."""
    command = [
        *(sys.executable, "-m", "benchmarks.against_transformers", "--step", step, "--folder", str(folder)),
        *("--batch-size", str(batch_size), "--prompts", str(args.prompts), "--max-tokens", str(args.max_tokens)),
        *("--prompt-tokens", str(args.prompt_tokens), "--dtype", args.dtype),
    ]
    print(f"{step} {batch_size or ''} ...", flush=True)
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict = json.loads(run.stdout.splitlines()[-1])
    return result


def prompts(args: argparse.Namespace) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(4, 50000) for _ in range(args.prompt_tokens)] for _ in range(args.prompts)]


def make_model(args: argparse.Namespace) -> dict:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **SHAPE), dtype=torch.bfloat16)
    model.save_pretrained(args.folder, max_shard_size="1GB")
    return {}


def run_ours(args: argparse.Namespace) -> dict:
    from flexgen_lite import FlexGenLite, SamplingParams

    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.0, ignore_eos=True)
    with FlexGenLite(args.folder, dtype=args.dtype) as model:
        print(model.plan, file=sys.stderr)
        model.generate([[5, 6, 7]], SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
        before = model.status().totals
        outputs = model.generate(prompts(args), params)
        after = model.status().totals
    seconds = {key: after[key] - before.get(key, 0.0) for key in after if key.endswith("_seconds")}
    print({key: round(value, 2) for key, value in seconds.items()}, file=sys.stderr)
    return row("flexgen-lite", seconds["busy_seconds"], [list(output.token_ids) for output in outputs])


def run_theirs(args: argparse.Namespace) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=getattr(torch, args.dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False, pad_token_id=1)
    ids, tokens = torch.tensor(prompts(args)), []
    start = time.perf_counter()
    for batch in ids.split(args.batch_size):
        output = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=args.max_tokens,
            do_sample=False,
            pad_token_id=1,
        )
        tokens += output[:, ids.shape[1] :].tolist()
    return row(f"transformers, batch {args.batch_size}", time.perf_counter() - start, tokens)


def row(name: str, seconds: float, tokens: list[list[int]]) -> dict:
    rate = sum(map(len, tokens)) / seconds
    return {"name": name, "seconds": seconds, "tokens_per_second": rate, "tokens": tokens}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def commit() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()

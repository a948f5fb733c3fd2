"""A job on a hybrid cut to some layers, at published widths with made-up weights: ours beside Transformers' `generate`.

    python -m benchmarks.hybrids [--type qwen3_5_moe_text] [--layers 8] [--prompts 64] [--prompt-tokens 256]
        [--max-tokens 32] [--ram 12GiB] [--rounds 1] [--only ours|theirs]

The default is Qwen3.5-35B-A3B's shape. bfloat16; both generate the same number of tokens of prompts of one length,
which needs no padding, each in a process of its own. Ours keeps to `--ram`; Transformers has the whole model in memory
and all prompts in one batch. Printed are seconds of each, without loading, and the median ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import AutoConfig

KINDS = {"qwen3_5_moe_text": 4, "qwen3_next": 4, "qwen3_5_text": 4}
"""Types, and after how many layers their pattern comes again: the last of those is attention."""


def write_config(folder: Path, model_type: str, layers: int) -> None:
    """A published shape, cut."""
    every = KINDS[model_type]
    kinds = ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)]
    config = AutoConfig.for_model(model_type, num_hidden_layers=layers, layer_types=kinds)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(10, 30000) for _ in range(args.prompt_tokens)] for _ in range(args.prompts)]


def run_ours(folder: str, args: argparse.Namespace) -> dict[str, float]:
    from flexgen_lite import FlexGenLite, SamplingParams

    options = {"load_format": "dummy", "dtype": "bfloat16", "ram": args.ram, "max_sequences": args.prompts}
    with FlexGenLite(folder, **options) as model:
        print(model.plan, file=sys.stderr)
        start = time.perf_counter()
        outputs = model.generate(prompts_of(args), SamplingParams(max_tokens=args.max_tokens, ignore_eos=True))
        seconds = time.perf_counter() - start
        status = model.status()
    assert all(len(output.token_ids) == args.max_tokens for output in outputs), [o.error for o in outputs]
    lanes = {key: value for key, value in status.totals.items() if key.endswith(("_seconds", "_bytes"))}
    return {"seconds": seconds, "peak_gib": status.memory["peak"] / 2**30, **lanes}


def run_theirs(folder: str, args: argparse.Namespace) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = AutoConfig.from_pretrained(folder)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    block = ((torch.rand((1 << 24) - 77) - 0.5) * 0.07).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            for piece in parameter.data.view(-1).split(len(block)):
                piece.copy_(block[: len(piece)])
        ids = torch.tensor(prompts_of(args))
        start = time.perf_counter()
        output = model.generate(
            ids, max_new_tokens=args.max_tokens, min_new_tokens=args.max_tokens, do_sample=False, pad_token_id=0
        )
        seconds = time.perf_counter() - start
    assert output.shape[1] == args.prompt_tokens + args.max_tokens
    return {"seconds": seconds}


RUNS = {"ours": run_ours, "theirs": run_theirs}


def measure(name: str, folder: str) -> dict[str, float]:
    """In a process of its own."""
    command = [sys.executable, "-m", "benchmarks.hybrids", *sys.argv[1:], "--only", name, "--folder", folder]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    print(name, ", ".join(f"{key} {value:,.1f}" for key, value in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", default="qwen3_5_moe_text", choices=KINDS)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--ram", default="12GiB")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=RUNS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(RUNS[args.only](args.folder, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), args.type, args.layers)
        names = [args.only] if args.only else list(RUNS)
        rounds = [{name: measure(name, folder)["seconds"] for name in names} for _ in range(args.rounds)]
    if len(names) > 1:
        ratios = [one["theirs"] / one["ours"] for one in rounds]
        print(f"{statistics.median(ratios):.2f} x Transformers ({args.rounds} rounds)")


if __name__ == "__main__":
    main()

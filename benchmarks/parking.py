"""What KV on disk saves: sequences that are preempted, and an engine that is started again.

    python -m benchmarks.parking --dir /a/fast/disk
    python -m benchmarks.parking --dir /a/fast/disk --hidden 2048 --layers 22 --prompt 1500

A model of random weights. First a job in which long answers follow many short ones, in so little memory that sequences
have to make room for others: seconds and tokens computed again, without and with `kv_disk`, in turns. Then requests
that begin alike, on an engine that was just started: seconds from the first request to the last answer, without and
with what another engine has stored. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexgen_lite import FlexGenLite, SamplingParams

VOCAB = 2048
SHORT_ONES = 150


def write_config(folder: Path, hidden: int, layers: int, length: int) -> Path:
    """Of Llama, four queries to a KV head."""
    heads = hidden // 64
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4), "vocab_size": VOCAB, "max_position_embeddings": length,
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prompts_of(count: int, length: int, common: int, seed: int) -> list[list[int]]:
    """Of `length` tokens, `common` of them alike."""
    draw = random.Random(seed)
    head = [draw.randrange(5, VOCAB) for _ in range(common)]
    return [[*head, *(draw.randrange(5, VOCAB) for _ in range(length - common))] for _ in range(count)]


def job_of(args: argparse.Namespace) -> tuple[list[list[int]], list[SamplingParams]]:
    """In each wave, many answers end with their first token, so that short ones are expected; then come some that are
    as long as they may be."""
    long = SamplingParams(max_tokens=args.max_tokens, temperature=0.0, ignore_eos=True)
    short = SamplingParams(max_tokens=args.max_tokens, temperature=0.0, stop_token_ids=[*range(VOCAB)])
    prompts: list[list[int]] = []
    params: list[SamplingParams] = []
    for wave in range(args.waves):
        prompts += prompts_of(SHORT_ONES, 16, 0, seed=2 * wave) + prompts_of(
            args.long, args.prompt, 0, seed=2 * wave + 1
        )
        params += [short] * SHORT_ONES + [long] * args.long
    return prompts, params


def run(model: Path, prompts: Sequence[Sequence[int]], params: Any, **options: Any) -> dict[str, float]:
    """Seconds of the job, and counters."""
    with FlexGenLite(str(model), load_format="dummy", **options) as engine:
        begun = time.monotonic()
        answers = engine.generate([list(prompt) for prompt in prompts], params)
        seconds = time.monotonic() - begun
        assert all(answer.error is None for answer in answers), next(answer.error for answer in answers if answer.error)
        return {"seconds": seconds, **engine.status().totals}


def median(runs: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(run.get(name, 0.0) for run in runs)


def parking(model: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    prompts, params = job_of(args)
    options: dict[str, Any] = {"ram": args.ram, "dtype": args.dtype, "prefix_caching": False}
    on_disk = {"kv_disk": args.kv_disk, "kv_disk_dir": str(folder)}
    runs: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for _ in range(args.times):
        runs["without"].append(run(model, prompts, params, **options))
        runs["with"].append(run(model, prompts, params, **options, **on_disk))
    names = ("seconds", "passes", "sent_back", "recomputed_tokens", "parked_sequences", "kv_disk_written_bytes")
    found = {kind: {name: round(median(of, name), 2) for name in names} for kind, of in runs.items()}
    return found | {"times_as_fast": round(found["without"]["seconds"] / found["with"]["seconds"], 3)}


def restarts(model: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    prompts = prompts_of(16, args.prompt + 32, args.prompt, seed=2)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    options: dict[str, Any] = {"dtype": args.dtype, "prefix_caching": True}
    on_disk = {"kv_disk": args.kv_disk, "kv_disk_dir": str(folder)}
    run(model, prompts, params, **options, **on_disk)  # what the others find
    runs: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for _ in range(args.times):
        runs["without"].append(run(model, prompts, params, **options))
        runs["with"].append(run(model, prompts, params, **options, **on_disk))
    names = ("seconds", "prompt_tokens", "disk_prefix_tokens", "kv_disk_read_bytes")
    found = {kind: {name: round(median(of, name), 2) for name in names} for kind, of in runs.items()}
    return found | {"times_as_fast": round(found["without"]["seconds"] / found["with"]["seconds"], 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="on the disk that is to be used")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ram", default="1150MiB", help="of the job with preemption")
    parser.add_argument("--kv-disk", default="8GiB")
    parser.add_argument("--waves", type=int, default=1)
    parser.add_argument("--long", type=int, default=12, help="long answers of a wave")
    parser.add_argument("--prompt", type=int, default=1500, help="tokens")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--times", type=int, default=2)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="parking-", dir=args.dir))
    try:
        model = write_config(folder / "model", args.hidden, args.layers, 4096)
        found = {"parking": parking(model, folder / "kv", args), "restart": restarts(model, folder / "kv", args)}
    finally:
        shutil.rmtree(folder)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

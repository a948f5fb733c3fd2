"""What KV on disk saves: sequences that are preempted, and an engine that is started again.

    python -m benchmarks.parking --dir /a/fast/disk
    python -m benchmarks.parking --dir /a/fast/disk --hidden 2048 --layers 22 --prompt 1500
    python -m benchmarks.parking --dir /a/fast/disk --only answers

A model of random weights, each job without and with `kv_disk`, in turns; the ratio is that of the medians.

- answers: short prompts, answers of very different lengths far below `max_tokens`. Also how many sequences could ride
  in a pass: as many as the KV cache has room for, each with what it holds on average.
- preempted: long answers follow many short ones, in so little memory that sequences have to make room for others:
  seconds and tokens computed again.
- restart: requests that begin alike, on an engine that was just started: seconds from the first request to the last
  answer, without and with what another engine has stored.

Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flexgen_lite import FlexGenLite, SamplingParams

VOCAB = 2048
SHORT_ONES = 150
MOST_TOKENS = 1000  # of answers of very different lengths
SHORT_PROMPT = 32
HIDDEN = 512  # of the model for these
# Of their means: a Pareto distribution's exponent and least value, and a limit.
TAIL, LEAST_MEAN, MOST_MEAN = 1.2, 20, 600


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


def answers_of(count: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Each token of an answer, drawn from all alike, ends it with the same chance: that of its request."""
    draw, params = random.Random(1), []
    for seed in range(count):
        mean = min(MOST_MEAN, LEAST_MEAN * draw.paretovariate(TAIL))
        ends = [*range(max(1, round(VOCAB / mean)))]
        params.append(SamplingParams(max_tokens=MOST_TOKENS, temperature=1.0, seed=seed, stop_token_ids=ends))
    return prompts_of(count, SHORT_PROMPT, 0, seed=0), params


def run(model: Path, prompts: Sequence[Sequence[int]], params: Any, **options: Any) -> dict[str, Any]:
    """Seconds of the job, counters, tokens of each answer, and those that the KV cache holds."""
    with FlexGenLite(str(model), load_format="dummy", **options) as engine:
        begun = time.monotonic()
        answers = engine.generate([list(prompt) for prompt in prompts], params)
        seconds = time.monotonic() - begun
        assert all(answer.error is None for answer in answers), next(answer.error for answer in answers if answer.error)
        lengths = [len(answer.outputs[0].token_ids) for answer in answers]
        room = re.search(r"KV cache  ([\d,]+) tokens", engine.plan)
        assert room, engine.plan
        found = {"lengths": lengths, "kv_tokens": int(room[1].replace(",", ""))}
        return {"seconds": seconds, "generated": sum(lengths), **found, **engine.status().totals}


def median(runs: Sequence[dict[str, Any]], name: str) -> float:
    return statistics.median(run.get(name, 0.0) for run in runs)


def in_turns(
    times: int, names: Sequence[str], on_disk: dict[str, Any], run_with: Callable[..., dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Medians without and with `on_disk`, their ratio; and the runs."""
    runs: dict[str, list[dict[str, Any]]] = {"without": [], "with": []}
    for _ in range(times):
        for kind, options in (("without", {}), ("with", on_disk)):
            runs[kind].append(run_with(**options))
            print(kind, {name: runs[kind][-1].get(name, 0) for name in names}, file=sys.stderr, flush=True)
    found: dict[str, Any] = {kind: {name: round(median(of, name), 2) for name in names} for kind, of in runs.items()}
    return found | {
        "times_as_fast": round(median(runs["without"], "seconds") / median(runs["with"], "seconds"), 3)
    }, runs


def answers(model: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    model = write_config(model.with_name("small"), HIDDEN, args.layers, SHORT_PROMPT + MOST_TOKENS)
    prompts, params = answers_of(args.answers)
    options: dict[str, Any] = {"ram": args.answers_ram, "dtype": args.dtype, "prefix_caching": False}
    options |= {"max_sequences": args.sequences}
    on_disk = {"kv_disk": args.kv_disk, "kv_disk_dir": str(folder)}
    names = ("seconds", "generated", "passes", "kv_tokens", "sent_back", "recomputed_tokens", "parked_sequences",
             "kv_disk_written_bytes", "kv_disk_read_bytes")  # fmt: skip
    found, runs = in_turns(args.times, names, on_disk, lambda **more: run(model, prompts, params, **options, **more))
    for kind in runs:
        found[kind]["ride_in_a_pass"] = round(found[kind]["generated"] / found[kind]["passes"], 1)
    lengths = runs["with"][0]["lengths"]
    held = sum(length * (SHORT_PROMPT + length / 2) for length in lengths) / sum(lengths)
    could_ride = min(args.sequences, found["with"]["kv_tokens"] / held)
    least = max(sum(lengths) / could_ride, max(lengths))
    return found | {"could_ride_in_a_pass": round(could_ride, 1), "passes_at_least": round(least)}


def preempted(model: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    prompts, params = job_of(args)
    options: dict[str, Any] = {"ram": args.ram, "dtype": args.dtype, "prefix_caching": False}
    on_disk = {"kv_disk": args.kv_disk, "kv_disk_dir": str(folder)}
    names = ("seconds", "passes", "sent_back", "recomputed_tokens", "parked_sequences", "kv_disk_written_bytes")
    return in_turns(args.times, names, on_disk, lambda **more: run(model, prompts, params, **options, **more))[0]


def restarts(model: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    prompts = prompts_of(16, args.prompt + 32, args.prompt, seed=2)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    options: dict[str, Any] = {"dtype": args.dtype, "prefix_caching": True}
    on_disk = {"kv_disk": args.kv_disk, "kv_disk_dir": str(folder)}
    run(model, prompts, params, **options, **on_disk)  # what the others find
    names = ("seconds", "prompt_tokens", "disk_prefix_tokens", "kv_disk_read_bytes")
    return in_turns(args.times, names, on_disk, lambda **more: run(model, prompts, params, **options, **more))[0]


JOBS = {"answers": answers, "preempted": preempted, "restart": restarts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="on the disk that is to be used")
    parser.add_argument("--only", choices=JOBS, help="one of the jobs")
    parser.add_argument("--hidden", type=int, default=1024, help="of the model for the other jobs")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ram", default="1150MiB", help="of the job with preemption")
    parser.add_argument("--answers", type=int, default=400, help="requests with answers of very different lengths")
    parser.add_argument("--answers-ram", default="920MiB", help="of these")
    parser.add_argument("--sequences", type=int, default=128, help="of these, at once")
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
        chosen = [name for name in JOBS if args.only in (None, name)]
        found = {name: JOBS[name](model, folder / "kv", args) for name in chosen}
    finally:
        shutil.rmtree(folder)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

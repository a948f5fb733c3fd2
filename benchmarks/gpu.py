"""The GPU as compute device: this machine's rates, and a model of a known shape with random weights.

    python -m benchmarks.gpu rates
    python -m benchmarks.gpu run --shape opt-30b --system ours --out results/
    python -m benchmarks.gpu compare --shapes opt-6.7b opt-30b --out results/

`compare` runs ours and its peers, and writes a table and our traces. `run` prints one JSON object: generated tokens per
second from the first submission to the last result and, of ours, what each lane was busy with and how much was moved.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.gpu_table import compare

OPT = {"vocab_size": 50272, "max_position_embeddings": 2048, "do_layer_norm_before": True}


def opt(layers: int, hidden: int, heads: int) -> tuple[str, dict[str, Any]]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return "opt", {**OPT, **sizes, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden}


def llama(layers: int, hidden: int, heads: int, inner: int) -> tuple[str, dict[str, Any]]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return "llama", {**sizes, "intermediate_size": inner, "num_key_value_heads": 8, "vocab_size": 128256}


SHAPES = {
    "opt-1.3b": opt(24, 2048, 32),
    "opt-6.7b": opt(32, 4096, 32),
    "opt-13b": opt(40, 5120, 40),
    "opt-30b": opt(48, 7168, 56),
    "llama-3-8b": llama(32, 4096, 32, 14336),
    "llama-3-70b": llama(80, 8192, 64, 28672),
}


def make_model(shape: str, directory: Path, dtype: str) -> Path:
    """A model directory that holds config.json alone."""
    kind, values = SHAPES[shape]
    AutoConfig.for_model(kind, **values, dtype=dtype).save_pretrained(directory)
    return directory


def make_prompts(count: int, shortest: int, longest: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(5, 50000) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


# ---------------------------------------------------------------------------------------------- rates


def seconds_of(run: Callable[[], object], repeats: int = 5) -> float:
    """Median over some runs, by the device's own clock."""
    run()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000)
    return statistics.median(found)


def rates() -> dict[str, float]:
    """GB/s of page-locked copies and of reading main memory, TFLOP/s of a bfloat16 product."""
    size = 1 << 30
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True).fill_(1)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    pageable = torch.ones(size, dtype=torch.uint8)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    source = torch.ones(1 << 30, dtype=torch.float32)
    source.sum()
    start = time.perf_counter()
    source.sum()
    read = source.numel() * 4 / (time.perf_counter() - start)
    return {
        "host_to_device_gb_per_s": size / seconds_of(lambda: device.copy_(host, non_blocking=True)) / 1e9,
        "device_to_host_gb_per_s": size / seconds_of(lambda: host.copy_(device, non_blocking=True)) / 1e9,
        "pageable_to_device_gb_per_s": size / seconds_of(lambda: device.copy_(pageable)) / 1e9,
        "bfloat16_tflop_per_s": 2 * 8192**3 / seconds_of(lambda: a @ b) / 1e12,
        "memory_read_gb_per_s": read / 1e9,
        "threads": float(torch.get_num_threads()),
    }


# ---------------------------------------------------------------------------------------------- systems


def run_ours(model: Path, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    from flexgen_lite import FlexGenLite, SamplingParams

    settings = json.loads(args.settings)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        settings["trace"] = str(args.out / f"{args.shape}.trace.json")
    params = SamplingParams(max_tokens=args.max_tokens, temperature=0.0, ignore_eos=True)
    begun = time.perf_counter()
    options = {"device": "cuda", "dtype": args.dtype, "gpu": args.gpu, "load_format": "dummy", **settings}
    with FlexGenLite(model, **options) as engine:
        ready = time.perf_counter() - begun
        print(engine.plan, flush=True)
        before = engine.status().totals
        start = time.perf_counter()
        completions = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
        status = engine.status()
    total = {name: value - before.get(name, 0.0) for name, value in status.totals.items()}
    failed = [completion.error for completion in completions if completion.error is not None]
    busy = total["busy_seconds"]
    return {
        "seconds": seconds,
        "tokens": sum(len(completion.token_ids) for completion in completions),
        "ready_seconds": ready,
        "failed": len(failed),
        "first_failure": failed[0] if failed else None,
        "passes": total["passes"],
        "moved": {
            **{name: total[name] for name in ("uploaded_bytes", "kv_read_bytes", "disk_read_bytes")},
            "flop": 2.0 * _parameters(model) * (total["prompt_tokens"] + total["generated_tokens"]),
            "seconds": busy,
        },
        "lanes": {lane: total[f"{lane}_seconds"] / busy for lane in status.lanes},
        "overhead": total["overhead_seconds"] / busy,
        "memory": status.memory,
    }


def _parameters(model: Path) -> int:
    """Of products: the embeddings are looked up, and the head is as large."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return int(loaded.num_parameters())


def run_transformers(model: Path, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """Everything on the GPU, whatever `--gpu` says; batches of `--batch`, padded on the left."""
    from transformers import AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("cuda"):
        loaded = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).eval()
    return _generate(loaded, prompts, args)


def run_accelerate(model: Path, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """Accelerate's CPU offload: `--accelerate-gpu` of weights stay, the others come for every token."""
    from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
    from transformers import AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with init_empty_weights():
        loaded = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    loaded.to_empty(device="cpu")
    for parameter in loaded.parameters():
        parameter.data.fill_(0.01)
    loaded.tie_weights()
    memory: dict[int | str, int | str] = {0: args.accelerate_gpu, "cpu": "1000GiB"}
    places = infer_auto_device_map(loaded, memory, no_split_module_classes=loaded._no_split_modules)
    return _generate(dispatch_model(loaded.eval(), places), prompts, args)


def _generate(model: Any, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    tokens = 0
    for first in range(0, len(prompts), args.batch):
        batch = prompts[first : first + args.batch]
        width = max(map(len, batch))
        ids = torch.tensor([[1] * (width - len(prompt)) + prompt for prompt in batch], device="cuda")
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch], device="cuda")
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=args.max_tokens, min_new_tokens=args.max_tokens, do_sample=False
        )
        tokens += output[:, width:].numel()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_reserved()
    return {"seconds": time.perf_counter() - start, "tokens": tokens, "memory": {"gpu_peak": peak}}


def run_flexgen(model: Path, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """FlexGen 0.1.8 of the package index, OPT alone: every prompt padded to `--longest`, all of them as one block of
    batches of `--batch`. `--percent` as its own command takes it; the tokenizer, which it would fetch, is left out."""
    import flexgen.flex_opt as flex

    flex.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: None)
    flex.get_test_inputs = lambda length, count, _: [[5 + n % 100 for n in range(length)]] * count
    own = argparse.ArgumentParser()
    flex.add_parser_arguments(own)
    batches = len(prompts) // args.batch
    with tempfile.TemporaryDirectory() as offload:
        flex.run_flexgen(
            own.parse_args(
                [
                    *("--model", f"facebook/{args.shape}", "--path", flex.DUMMY_WEIGHT, "--offload-dir", offload),
                    *("--prompt-len", str(args.longest), "--gen-len", str(args.max_tokens), "--verbose", "1"),
                    *("--gpu-batch-size", str(args.batch), "--num-gpu-batches", str(batches), "--log-file", os.devnull),
                    *("--percent", *args.percent.split(), *(["--cpu-cache-compute"] if args.cpu_cache_compute else [])),
                ]
            )
        )
    seconds = sum(flex.timers("generate").costs)
    tokens = batches * args.batch * args.max_tokens
    return {"seconds": seconds, "tokens": tokens, "memory": {"gpu_peak": torch.cuda.max_memory_reserved()}}


SYSTEMS = {"flexgen": run_flexgen, "ours": run_ours, "transformers": run_transformers, "accelerate": run_accelerate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("rates")
    run = commands.add_parser("run")
    run.add_argument("--shape", choices=SHAPES, required=True)
    run.add_argument("--system", choices=SYSTEMS, required=True)
    run.add_argument("--dtype", default="bfloat16")
    run.add_argument("--gpu", default="16GiB", help="budget of GPU memory")
    run.add_argument("--prompts", type=int, default=64)
    run.add_argument("--shortest", type=int, default=512, help="tokens of a prompt")
    run.add_argument("--longest", type=int, default=512)
    run.add_argument("--max-tokens", type=int, default=32)
    run.add_argument("--batch", type=int, default=8, help="of the peers")
    run.add_argument("--accelerate-gpu", default="8GiB", help="what Accelerate may fill with weights")
    run.add_argument("--percent", default="20 80 0 100 100 0", help="FlexGen's placement")
    run.add_argument("--cpu-cache-compute", action="store_true", help="FlexGen: attention on the CPU")
    run.add_argument("--settings", default="{}", help="further options of ours, JSON")
    run.add_argument("--out", type=Path, default=None, help="directory for traces")
    beside = commands.add_parser("compare")
    beside.add_argument("--shapes", choices=SHAPES, nargs="+", default=["opt-6.7b", "opt-30b"])
    beside.add_argument("--prompts", type=int, default=256, help="of ours")
    beside.add_argument("--gpu", default="16GiB", help="budget of GPU memory")
    beside.add_argument("--timeout", type=float, default=3600, help="seconds a run may take")
    beside.add_argument("--out", type=Path, required=True, help="directory for the table, results and traces")
    args = parser.parse_args()
    if args.command == "rates":
        print(json.dumps(rates()))
        return
    if args.command == "compare":
        print(compare(args.shapes, args.prompts, args.gpu, args.out, args.timeout))
        return
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with tempfile.TemporaryDirectory() as directory:
        model = make_model(args.shape, Path(directory), args.dtype)
        prompts = make_prompts(args.prompts, args.shortest, args.longest)
        result = SYSTEMS[args.system](model, prompts, args)
    result["tokens_per_second"] = result["tokens"] / result["seconds"]
    print(json.dumps({"shape": args.shape, "system": args.system, **result}), flush=True)


if __name__ == "__main__":
    main()

"""How close streaming comes to the disk: the disk lane of a running job, beside plain parallel direct reads.

    python -m benchmarks.streaming MODEL [--prompts 32] [--prompt-tokens 128] [--max-tokens 8] [--dtype bfloat16]

All layers stream through two slots. Before and after the job the same files are read with `O_DIRECT`, four reads of
8 MiB in flight, into memory that is thrown away. Reported are both rates in GB/s, and of the passes that decode alone
the median share of the time in which the disk lane was busy.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

from flexgen_lite import FlexGenLite, SamplingParams
from flexgen_lite.plan.disk_rate import read_rate

READ_SECONDS = 4.0


def layer_bytes(files: list[Path]) -> int:
    """Bytes of all tensors that belong to a numbered layer."""
    total = 0
    for file in files:
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        spans = [entry["data_offsets"] for name, entry in header.items() if re.search(r"\.\d+\.", name)]
        total += sum(end - begin for begin, end in spans)
    return total


def disk_passes(trace: Path, last_prompt_pass: int) -> list[tuple[float, float]]:
    """(seconds, busy seconds of the disk lane) of the passes behind the prompts."""
    events: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [event for event in events if event["ph"] == "X"]
    passes = [event for event in spans if tracks[event["tid"]] == "pass"][last_prompt_pass:]
    loads = [(event["ts"], event["ts"] + event["dur"]) for event in spans if tracks[event["tid"]] == "disk"]
    result = []
    for one in passes:
        start, end = one["ts"], one["ts"] + one["dur"]
        busy = sum(max(0.0, min(end, stop) - max(start, begin)) for begin, stop in loads)
        result.append(((end - start) / 1e6, busy / 1e6))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    files = sorted(args.model.glob("*.safetensors"))
    random_ids = random.Random(0)
    prompts = [[random_ids.randrange(4, 30000) for _ in range(args.prompt_tokens)] for _ in range(args.prompts)]
    before = read_rate(files, READ_SECONDS)[0] / 1e9
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        length = args.prompt_tokens + args.max_tokens
        options = {"dtype": args.dtype, "layer_slots": 2, "max_sequences": args.prompts, "max_model_len": length}
        with FlexGenLite(str(args.model), trace=trace, **options) as model:
            print(model.plan)
            model.generate(prompts, SamplingParams(max_tokens=args.max_tokens, temperature=0.0, ignore_eos=True))
            num_passes = int(model.status().totals["passes"])
        decoding = disk_passes(trace, num_passes - args.max_tokens + 2)
    after = read_rate(files, READ_SECONDS)[0] / 1e9
    share = statistics.median(busy / seconds for seconds, busy in decoding)
    seconds = statistics.median(seconds for seconds, _ in decoding)
    print(f"plain reads {before:.2f} GB/s before, {after:.2f} GB/s after")
    print(f"a decode pass {seconds:.2f} s, disk lane busy {share:.1%} of it")
    rate = layer_bytes(files) / seconds / 1e9
    print(f"{rate:.2f} GB/s of layers: {rate / statistics.mean((before, after)):.0%} of plain reads")


if __name__ == "__main__":
    main()

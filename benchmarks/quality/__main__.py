"""How much each setting of the engine loses against the model in bfloat16, and llama.cpp's against its own.

    python -m benchmarks.quality MODEL [--text FILE] [--settings int8 int4 'mine:kv_dtype=int8,dtype=float32']
    python -m benchmarks.quality MODEL --peers bf16 q8_0 q4_0     llama.cpp's, too; installed on first use

Three things are measured for each setting, on the same token ids:

- Perplexity: a text in windows of --window tokens, each behind the tokenizer's beginning of sequence, every token but
  the first of a window scored as a prompt. Keys and values of prompts are rounded by `kv_dtype: int8` as those of
  generated tokens are, so that this measures it, too.
- The reference's greedy answers to --prompts pieces of the text, scored behind their prompts: the share of their tokens
  that are the most likely ones here as well, and by how much the logprobs differ. After each token both go on from the
  same context, so one difference does not make others.
- The setting's own greedy answers: up to where they are the reference's. This is what users see, decoding included; it
  falls with the length of the answers, and the first close call decides about all that follows.

For llama.cpp the first two, on the answers of our reference: each kind against llama.cpp in bfloat16. It serves the
families that `benchmarks.peers.convert_llama_cpp` writes. Where a model was made from quantised weights, kinds with the
same grid have an easier task, and others a harder one, than on weights that were never rounded.

The text is the documentation of this checkout, and held-out records of the demonstration for its own model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from benchmarks.peers import machine
from benchmarks.quality import engine, peers
from benchmarks.quality.figures import Scored, figures
from benchmarks.quality.report import EXPLANATION, Row, shortened, table
from benchmarks.quality.settings import REFERENCE, SETTINGS, Setting, parse_options, parse_setting
from benchmarks.quality.task import Task, docs_text, is_demo_model, prose_task, records_task


def main() -> None:
    args = parse_arguments()
    task = make_task(args)
    print(f"{task.text}; {len(task.prompts)} answers of {task.max_tokens} tokens", flush=True)
    rows: list[Row] = []
    found: list[dict[str, Any]] = []

    def tell(row: Row, **more: Any) -> None:
        rows.append(row)
        found.append({"title": row.title, **more, "failure": row.failure})
        if row.figures is not None:
            found[-1] |= row.figures.as_json()
        print(f"{row.title}: {shortened(row.failure) or row.figures}", flush=True)
        if args.json is not None:
            args.json.write_text(as_json(args.model, task, found), encoding="utf-8")

    reference = run_setting(args, REFERENCE, task, None, tell)
    if reference is None or reference.answers is None:
        raise SystemExit("the reference failed: there is nothing to hold the others against")
    for setting in args.settings:
        run_setting(args, setting, task, reference, tell)
    if args.peers:
        run_peers(args, task, reference.answers, tell)
    print("", table(rows), EXPLANATION, sep="\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model directory with its tokenizer")
    parser.add_argument("--text", type=Path, help="a file, instead of the documentation")
    parser.add_argument("--settings", nargs="*", type=setting_argument, default=list(SETTINGS.values()),
                        metavar="SETTING", help=f"of {', '.join(SETTINGS)}, or TITLE:KEY=VALUE,...")  # fmt: skip
    parser.add_argument("--peers", nargs="*", choices=list(peers.KINDS), default=[], help="none named: none")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for every setting, such as ram=4GiB")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the text")
    parser.add_argument("--window", type=int, default=1024, help="tokens; never more than the model takes")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each")
    parser.add_argument("--max-tokens", type=int, default=64, help="generated after each")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/flexgen-lite-bench").expanduser())
    args = parser.parse_args()
    args.cache = args.cache.absolute()
    args.cache.mkdir(parents=True, exist_ok=True)
    return args


def setting_argument(text: str) -> Setting:
    try:
        return parse_setting(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_task(args: argparse.Namespace) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.text is None and is_demo_model(args.model):
        return records_task(tokenizer, args.tokens, args.prompts, args.max_tokens)
    most = AutoConfig.from_pretrained(args.model).get_text_config().max_position_embeddings
    prompt = min(args.prompt, most - args.max_tokens)
    text = docs_text() if args.text is None else args.text.read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    name = f"{'the documentation' if args.text is None else args.text.name} (SHA-256 {digest}...)"
    window = min(args.window, most)
    return prose_task(tokenizer, name, text, args.tokens, window, args.prompts, prompt, args.max_tokens)


def run_setting(
    args: argparse.Namespace, setting: Setting, task: Task, reference: Scored | None, tell: Any
) -> Scored | None:
    options = {**parse_options(args.set), **setting.options}
    start = time.monotonic()
    try:
        scored = engine.measure(args.model, options, task, None if reference is None else reference.answers)
    except (RuntimeError, ValueError) as error:  # a setting that cannot be had does not end the others
        tell(Row(setting.title, None, str(error)), options=options)
        return None
    seconds = round(time.monotonic() - start, 1)
    tell(Row(setting.title, figures(scored, reference)), options=options, seconds=seconds)
    return scored


def run_peers(args: argparse.Namespace, task: Task, answers: list[list[int]], tell: Any) -> None:
    whole: Scored | None = None
    try:
        for kind, scored, failure in peers.measure(args.model, args.peers, task, answers, args.cache):
            if scored is None or (whole is None and kind != peers.REFERENCE):
                tell(Row(peers.KINDS[kind], None, failure or "llama.cpp in bfloat16 failed"))
                continue
            tell(Row(peers.KINDS[kind], figures(scored, whole)))
            whole = whole or scored
    except RuntimeError as error:
        tell(Row("llama.cpp", None, str(error)))


def as_json(model: str, task: Task, found: list[dict[str, Any]]) -> str:
    told = {
        "conditions": machine.conditions(),
        "model": Path(model).resolve().name,
        "text": task.text,
        "tokens_scored": task.num_scored,
        "answers": f"{len(task.prompts)} of {task.max_tokens} tokens",
        "rows": found,
    }
    return json.dumps(told, indent=1) + "\n"


if __name__ == "__main__":
    main()

"""Data wrangling on Ray Data: Parquet files in, Parquet files out, with an engine in each of the actors.

    python examples/ray_label.py records.parquet labelled [--model DIR] [--actors 4] [--ram 8GiB]

The files have the columns `id` and `record`, as examples/records.csv has them. Without --model the small one is used
that comes with flexgen-lite: it reads names, dates and phone numbers.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import ray
import ray.data

from flexgen_lite.demo.pretrained import MODEL
from flexgen_lite.ray.processor import FlexGenLiteProcessorConfig, build_processor


def ask(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": f"{row['record']} =>", "sampling_params": {"max_tokens": 96, "temperature": 0.0}}


def read_answer(row: dict[str, Any]) -> dict[str, Any]:
    """What is no JSON raises: such a row comes back with an error, and all its columns."""
    answer = json.loads(row["generated_text"])
    return {"id": row["id"], "record": row["record"], **{name: answer[name] for name in ("name", "born", "phone")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", help="Parquet files")
    parser.add_argument("labelled", help="a directory")
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--ram", default="2GiB")
    args = parser.parse_args()

    config = FlexGenLiteProcessorConfig(
        model_source=args.model, engine_kwargs={"ram": args.ram}, concurrency=args.actors, batch_size=64
    )
    processor = build_processor(config, preprocess=ask, postprocess=read_answer)
    processor(ray.data.read_parquet(args.records)).write_parquet(args.labelled)

    rows = ray.data.read_parquet(args.labelled).take_all()
    failed = sum(1 for row in rows if row["__inference_error__"])
    print(f"{len(rows)} records, {failed} failed: {args.labelled}")


if __name__ == "__main__":
    main()

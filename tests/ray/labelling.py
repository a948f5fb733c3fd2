"""A program that labels Parquet files on the Ray that runs, and may end in the middle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig

from flexgen_lite.ray.processor import build_processor
from tests.ray.pipelines import config_of, until, written

PARAMS = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("run", help="what its rows say that they were made by")
    parser.add_argument("--fails-on", type=int, help="the id of a row that ends it, once there are others")
    parser.add_argument("--checkpoint", help="a directory")
    parser.add_argument("--leaves-out", action="store_true", help="what the target has")
    args = parser.parse_args()

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        return {"sampling_params": PARAMS}

    def finish(row: dict[str, Any]) -> dict[str, Any]:
        if row["id"] == args.fails_on:
            until(lambda: written(args.target), "row of the others that is written")
            raise ValueError("the end was asked for")
        return {"id": row["id"], "tokens": row["generated_tokens"], "run": args.run}

    ray.init(logging_level="warning")
    context = ray.data.DataContext.get_current()
    dataset = ray.data.read_parquet(args.source)
    if args.leaves_out:
        done = {row["id"] for row in ray.data.read_parquet(str(args.target)).select_columns(["id"]).iter_rows()}
        dataset = ray.data.read_parquet(args.source).filter(lambda row: row["id"] not in done)
    if args.checkpoint:
        context.checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path=args.checkpoint)
        dataset = ray.data.read_parquet(args.source)
    config = config_of(args.model, should_continue_on_error=False)
    build_processor(config, prepare, finish)(dataset).write_parquet(str(args.target))


if __name__ == "__main__":
    main()

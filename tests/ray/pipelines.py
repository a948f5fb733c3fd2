"""What the tests of Ray Data have in common: processors of tiny models, and the processes behind them."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from flexgen_lite.ray.processor import FlexGenLiteProcessorConfig
from tests.tiny_models import SMALL_PASSES

Found = TypeVar("Found")
ENGINE: dict[str, Any] = SMALL_PASSES | {"device": "cpu", "ram": "1GiB", "attention_workers": 1}
PATIENCE_SECONDS = 100.0


def config_of(model: Path, engine: dict[str, Any] | None = None, **options: Any) -> FlexGenLiteProcessorConfig:
    """Small batches, several at once."""
    kwargs = ENGINE | (engine or {})
    return FlexGenLiteProcessorConfig(
        model_source=str(model), engine_kwargs=kwargs, **{"batch_size": 8, "max_concurrent_batches": 4, **options}
    )


def coordinators() -> list[psutil.Process]:
    """Of the engines that Ray's actors have started: descendants of this process."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "flexgen_lite.engine" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def coordinator_of(worker: psutil.Process) -> psutil.Process:
    (found,) = [process for process in worker.parents() if process.pid in {each.pid for each in coordinators()}]
    return found


def actor_of(coordinator: psutil.Process) -> psutil.Process:
    parent = coordinator.parent()
    assert parent is not None and "ray::" in parent.name() + " ".join(parent.cmdline()), parent
    return parent


def until(find: Callable[[], Found], what: str) -> Found:
    """What is found, once it is something. Of processes that others start there is no word."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := find()):
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE_SECONDS:g} s"
        time.sleep(0.02)
    return found


def until_engines_are_gone() -> None:
    """A job that has failed holds its actors as long as anybody holds its traceback."""

    def are_gone() -> bool:
        gc.collect()
        return not coordinators()

    until(are_gone, "end of the engines")


def by_id(rows: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Each row once."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        assert row["id"] not in found, f"row {row['id']} is there twice"
        found[row["id"]] = row
    return found


def written(folder: Path) -> dict[int, dict[str, Any]]:
    """The rows of its files, but for those that are being written."""
    rows: list[dict[str, Any]] = []
    for path in folder.glob("*.parquet"):
        with contextlib.suppress(pa.ArrowInvalid):
            rows += pq.read_table(path).to_pylist()
    return by_id(rows)

"""Jobs that ended in the middle, gone on with: by Ray Data's checkpoints, and by what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from ray.data.checkpoint import CheckpointConfig

from flexgen_lite.ray.processor import build_processor
from tests.ray.pipelines import by_id, config_of, until_engines_are_gone
from tests.tiny_models import ragged_prompts

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("no_engines")]
ROWS = 64
PARAMS = {"max_tokens": 4, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture
def source(tmp_path: Path) -> str:
    """Files of a few rows."""
    folder = tmp_path / "source"
    folder.mkdir()
    prompts = ragged_prompts(ROWS, 20)
    for first in range(0, ROWS, 16):
        table = pa.table({"id": range(first, first + 16), "tokenized_prompt": prompts[first : first + 16]})
        pq.write_table(table, folder / f"{first}.parquet")
    return str(folder)


def label(model: Path, dataset: ray.data.Dataset, run: str, fails_on: int, target: Path) -> None:
    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        return {"sampling_params": PARAMS}

    def finish(row: dict[str, Any]) -> dict[str, Any]:
        1 // (0 if row["id"] == fails_on else 1)
        return {"id": row["id"], "tokens": row["generated_tokens"], "run": run}

    config = config_of(model, should_continue_on_error=False)
    until_engines_are_gone()
    build_processor(config, prepare, finish)(dataset).write_parquet(str(target))


def written(target: Path) -> dict[int, dict[str, Any]]:
    return by_id(row for path in target.glob("*.parquet") for row in pq.read_table(path).to_pylist())


def test_checkpoints_of_ray_data(model: Path, source: str, tmp_path: Path) -> None:
    context, target = ray.data.DataContext.get_current(), tmp_path / "target"
    context.checkpoint_config = CheckpointConfig(id_column="id", checkpoint_path=str(tmp_path / "checkpoint"))
    try:
        with pytest.raises(Exception, match="ZeroDivisionError"):
            label(model, ray.data.read_parquet(source), "first", ROWS - 1, target)
        before = written(target)
        assert 0 < len(before) < ROWS
        label(model, ray.data.read_parquet(source), "second", -1, target)
    finally:
        context.checkpoint_config = None
    after = written(target)
    assert sorted(after) == list(range(ROWS))
    assert {number: row for number, row in after.items() if row["run"] == "first"} == before


def test_what_is_written_is_left_out(model: Path, source: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(Exception, match="ZeroDivisionError"):
        label(model, ray.data.read_parquet(source), "first", ROWS - 1, target)
    before = written(target)
    assert 0 < len(before) < ROWS
    done = {row["id"] for row in ray.data.read_parquet(str(target)).select_columns(["id"]).iter_rows()}
    rest = ray.data.read_parquet(source).filter(lambda row: row["id"] not in done)
    label(model, rest, "second", -1, target)
    after = written(target)
    assert sorted(after) == list(range(ROWS))
    assert {number: row for number, row in after.items() if row["run"] == "first"} == before

"""Programs that ended in the middle, gone on with: by Ray Data's checkpoints, and by what is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from tests.ray.pipelines import written
from tests.tiny_models import ragged_prompts

ROOT = Path(__file__).parents[2]
ROWS = 64
pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("no_engines")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files of a few rows."""
    folder = tmp_path / "source"
    folder.mkdir()
    prompts = ragged_prompts(ROWS, 20)
    for first in range(0, ROWS, 16):
        table = pa.table({"id": range(first, first + 16), "tokenized_prompt": prompts[first : first + 16]})
        pq.write_table(table, folder / f"{first}.parquet")
    return folder


def label(*arguments: object) -> str:
    """What the program says of an error; its actors end with it."""
    command = [sys.executable, "-m", "tests.ray.labelling", *map(str, arguments)]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize("way", ["checkpoint", "leaves-out"])
def test_no_row_is_lost_or_made_twice(way: str, model: Path, source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    goes_on = [f"--checkpoint={tmp_path / 'checkpoint'}"] if way == "checkpoint" else ["--leaves-out"]
    first = goes_on if way == "checkpoint" else []
    assert "the end was asked for" in label(model, source, target, "first", f"--fails-on={ROWS - 1}", *first)
    before = written(target)
    assert 0 < len(before) < ROWS
    assert label(model, source, target, "second", *goes_on) == ""
    after = written(target)
    assert sorted(after) == list(range(ROWS))
    assert {number: row for number, row in after.items() if row["run"] == "first"} == before

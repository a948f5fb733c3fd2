"""The benchmark of Ray Data, with a few rows."""

from __future__ import annotations

import argparse
from functools import partial

import pytest

from benchmarks.ray_data import measure, naive, ours, run_batch
from flexgen_lite.demo.pretrained import MODEL

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("no_engines")]


def test_all_contestants_answer_all_rows(capsys: pytest.CaptureFixture[str]) -> None:
    contestants = {"run-batch": run_batch, "ours": ours, "naive-8": partial(naive, 8)}
    found = measure(contestants, argparse.Namespace(model=str(MODEL), ram="2GiB", rows=24, times=1))
    assert [*found["rows_per_second"]] == [*contestants] and min(found["rows_per_second"].values()) > 0
    assert capsys.readouterr().err.count(", 0 failed") == len(contestants)

"""What a batch file says about the work to come."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from flexgen_lite.batch.survey import BYTES_PER_TOKEN, survey
from flexgen_lite.plan.workload import Workload


def write(path: Path, bodies: list[dict[str, Any]]) -> Path:
    rows = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body} for i, body in enumerate(bodies)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_token_ids_are_counted(tmp_path: Path) -> None:
    found = survey(write(tmp_path / "f", [{"prompt": [5] * 100, "max_tokens": 20}] * 30))
    assert found is not None
    assert (found.sequences, found.typical_tokens) == (30, 120)
    assert found.longest_tokens >= 120


def test_text_is_estimated_and_one_long_line_bounds_the_longest(tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [{"prompt": "a" * 300, "max_tokens": 8}] * 40
    found = survey(write(tmp_path / "f", [*bodies, {"prompt": "ä" * 5000, "max_tokens": 30}]))
    assert found is not None
    assert found.typical_tokens == 300 // BYTES_PER_TOKEN + 1 + 8
    assert found.longest_tokens >= 2 * 5000 + 30, "a token has a byte at least"


def test_bad_lines_do_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "f", [{"prompt": [5] * 10, "max_tokens": 2}] * 3)
    path.write_bytes(b"not JSON\n\n" + path.read_bytes())
    found = survey(path)
    assert found is not None and found.typical_tokens == 12


def test_nothing_is_known_of_what_has_no_good_line_or_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x\n")
    os.mkfifo(tmp_path / "pipe")
    assert survey(tmp_path / "f") is None
    assert survey(tmp_path / "pipe") is None


def test_it_survives_the_way_to_the_coordinator() -> None:
    work = Workload(3, 20, 70, 90)
    assert Workload.from_dict(json.loads(json.dumps(work.to_dict()))) == work
    assert Workload.from_dict(None) is None


def test_one_good_line_beside_a_longer_one_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    good = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hi", "max_tokens": 5}}
    path.write_text(json.dumps(good) + "\n" + "x" * 1000 + "\n", encoding="utf-8")
    found = survey(path)
    assert found is not None and found.longest_likely == found.typical_tokens < found.longest_tokens

"""Which of several prospects is taken, and which of them rows of an earlier run are of."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexgen_lite.batch.file import BadLine, read_requests
from flexgen_lite.batch.result_row import encode_row, request_id_of
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.launcher.alternatives import Alternative
from flexgen_lite.launcher.choice import Candidate, Prospect, choose, of_the_rows
from flexgen_lite.launcher.search import Policy
from flexgen_lite.plan.plan import PlanError


def alternative(**settings: Any) -> Alternative:
    return Alternative(settings, EngineConfig(model="m", **settings))


def prospect(
    seconds: float | None, gain: float | None = 1.0, found: dict[str, Any] | None = None, **settings: Any
) -> Prospect:
    if seconds is None:
        return Prospect(alternative(**settings), None, None, PlanError("needs 8 GiB"))
    forecast: Any = SimpleNamespace(job=SimpleNamespace(requests=10, load=0.0, seconds=seconds))
    forecaster: Any = "a forecaster"
    return Prospect(alternative(**settings), forecaster, Policy(found or {}, forecast, gain))


def test_the_fastest_is_taken_with_what_was_found_for_it() -> None:
    found = [
        prospect(100.0, 1.2, {"max_sequences": 64}),
        prospect(50.0, 1.1, {"max_sequences": 128}, quantization="int4"),
        prospect(None, kv_dtype="int8"),
    ]
    chosen = choose(found, [prospect(10.0, quantization="int8")])
    assert chosen.policy.settings == {"quantization": "int4", "max_sequences": 128}
    assert chosen.policy.gain == pytest.approx(1.2 * 100 / 50), "beside the rules' choice of what is configured"
    assert [(row.name, row.job and row.job.seconds, row.problem) for row in chosen.rows] == [
        ("as configured", 100.0, ""),
        ("quantization=int4", 50.0, ""),
        ("kv_dtype=int8", None, "needs 8 GiB"),
        ("quantization=int8", 10.0, ""),
    ]


def test_what_is_configured_stands_where_little_is_gained() -> None:
    for seconds, settings in ((98.0, {"attention_workers": 2}), (93.0, {"quantization": "int4"})):
        chosen = choose([prospect(100.0), prospect(seconds, None, None, **settings)])
        assert chosen.policy.settings == {} and chosen.policy.gain == 1.0
    several = [prospect(93.0, quantization="int4"), prospect(95.0, attention_workers=2), prospect(97.0, page_tokens=32)]
    assert choose([prospect(100.0), *several]).policy.settings == {"attention_workers": 2}
    assert choose([prospect(100.0), prospect(90.0, kv_dtype="int8")]).policy.settings == {"kv_dtype": "int8"}
    assert not choose([prospect(100.0)]).rows, "there was nothing to choose"


def test_what_is_configured_need_not_be_possible() -> None:
    chosen = choose([prospect(None), prospect(98.0, quantization="int4")])
    assert chosen.policy.settings == {"quantization": "int4"} and chosen.policy.gain is None
    with pytest.raises(PlanError, match="needs 8 GiB"):
        choose([prospect(None), prospect(None, quantization="int4")])


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    row = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    lines = [json.dumps({"custom_id": name, **row}) for name in "abc"]
    path.write_text("\n".join(["no request", *lines]) + "\n")
    return path


def candidate(fingerprint: str, **settings: Any) -> Candidate:
    opened = SimpleNamespace(fingerprint=fingerprint, spec=SimpleNamespace(dtype="float32"))
    calibration: Any = SimpleNamespace(opened=opened)
    return Candidate(alternative(**settings), calibration)


def write_rows(path: Path, requests: Path, engine: str, which: slice) -> Path:
    with requests.open("rb") as lines:
        items = list(read_requests(lines))[which]
    rows = (
        encode_row("1", one.custom_id, request_id_of(one, engine), {"object": "text_completion"}, None) for one in items
    )
    path.write_bytes(b"".join(rows))
    return path


def test_rows_say_what_they_were_made_with(tmp_path: Path, requests: Path) -> None:
    wide, other = candidate("wide"), candidate("wide", compute_threads=1)
    few, failed = candidate("few", quantization="int4"), Candidate(alternative(kv_dtype="int8"), None, ValueError())
    all_of_them = [wide, other, few, failed]
    rows = write_rows(tmp_path / "few", requests, "few", slice(2, 3))
    assert of_the_rows(all_of_them, requests, rows) == [few]
    rows = write_rows(tmp_path / "wide", requests, "wide", slice(1, 2))
    assert of_the_rows(all_of_them, requests, rows) == [wide, other]
    bad = write_rows(tmp_path / "bad", requests, "few", slice(0, 1))
    assert isinstance(next(iter(read_requests(requests.open("rb")))), BadLine)
    assert of_the_rows(all_of_them, requests, bad) == all_of_them, "it has the same row whatever the engine"
    kept = candidate("wide", kv_dtype="int8")
    assert kept.fingerprint not in (None, "wide") and failed.fingerprint is None
    rows = write_rows(tmp_path / "kv", requests, kept.fingerprint or "", slice(3, 4))
    assert of_the_rows([wide, kept], requests, rows) == [kept]

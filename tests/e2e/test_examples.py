"""The examples, and the code in the pages of documentation, run as they are."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_lite import FlexGenLite
from flexgen_lite.demo.pretrained import MODEL

ROOT = Path(__file__).parents[2]


def run(*arguments: str | Path) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_label_records(tmp_path: Path) -> None:
    output = run("examples/label_records.py", "examples/records.csv", tmp_path / "labelled.csv")
    assert output.startswith("24 records, 0 failed")
    with (tmp_path / "labelled.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sorted(int(row["id"]) for row in rows) == list(range(24))
    assert sum(bool(re.fullmatch(r"\d{4}-\d\d-\d\d", row["born"])) for row in rows) >= 23


def test_score_benchmark() -> None:
    found = re.search(r"accuracy: ([\d.]+)% of 16", run("examples/score_benchmark.py", "examples/questions.jsonl"))
    assert found and float(found[1]) > 80, "the model was trained for it"


def test_client() -> None:
    with FlexGenLite(MODEL, ram="2GiB") as engine:
        output = run("examples/client.py", engine.endpoint, "john smith / 3 May 1990 =>", "x", "--max-tokens", "12")
    assert "0: '" in output and "1: '" in output
    first = re.search(r"^0: '(.*)'$", output, re.M)
    assert first and f"as it comes: {first[1]}\n" in output


@pytest.mark.parametrize("page", ["docs/python-api.md", "docs/evaluation.md"])
def test_python_in_the_documentation(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are indented by four; all of a page in one namespace, with the demo's model."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8").replace("path/to/model", str(MODEL))
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.M)
    code = [re.sub(r"^    ", "", block, flags=re.M) for block in blocks]
    python = [block for block in code if not re.match(r"\s*(pip|flexgen-lite|python) ", block)]
    assert python
    names: dict[str, object] = {}
    for block in python:
        exec(compile(block, page, "exec"), names)

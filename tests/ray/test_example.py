"""The example, and the code in the page of documentation, run as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from flexgen_lite.demo.pretrained import MODEL

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("no_engines")]


@pytest.fixture
def records(tmp_path: Path) -> Path:
    path = tmp_path / "records.parquet"
    pq.write_table(pyarrow.csv.read_csv(ROOT / "examples" / "records.csv"), path)
    return path


def test_ray_label(records: Path, tmp_path: Path) -> None:
    """In the Ray that runs for these tests."""
    import ray

    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "examples/ray_label.py", str(records), str(tmp_path / "labelled")],
        cwd=ROOT, env={**os.environ, "RAY_ADDRESS": address}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    print(done.stderr)
    assert done.returncode == 0, done.stderr
    assert "24 records, 0 failed" in done.stdout
    rows = pq.read_table(tmp_path / "labelled").to_pylist()
    assert sorted(row["id"] for row in rows) == list(range(24))
    assert sum(bool(re.fullmatch(r"\d{4}-\d\d-\d\d", row["born"])) for row in rows) >= 23


def test_python_in_the_documentation(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are indented by four; all of the page in one namespace, with the demo's model."""
    import ray.data

    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "ray.md").read_text(encoding="utf-8")
    for placeholder, real in (("path/to/model", MODEL), ("/data/in", records), ("/data/", f"{tmp_path}/")):
        text = text.replace(placeholder, str(real))
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.M)
    code = [re.sub(r"^    ", "", block, flags=re.M) for block in blocks]
    python = [block for block in code if not re.match(r"\s*(pip|python|make) ", block)]
    assert len(python) >= 2
    names: dict[str, object] = {}
    for block in python:
        try:
            exec(compile(block, "docs/ray.md", "exec"), names)
        finally:
            ray.data.DataContext.get_current().checkpoint_config = None

"""A file of any length goes through in the same memory, but for a few bytes a line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_engine import FakeEngine

WINDOW = 256  # requests under way: few, as what they take is not what a line takes
RUN = """
import sys
from pathlib import Path
from flexgen_lite.batch.run import BatchRun
from flexgen_lite.client.client import Client
from flexgen_lite.memory.usage import resident_bytes
from flexgen_lite.batch.result_file import ResultWriter

endpoint, source, out = sys.argv[1:]
with Client(endpoint) as client, ResultWriter(Path(out)) as results:
    last = BatchRun(client, Path(source), results).run(lambda _: None, 1.0)
print(last.done, last.failed, resident_bytes()[0])
"""


def memory_of(tmp_path: Path, count: int) -> int:
    """Bytes that the process has at the end of a batch of so many lines."""
    source, out = tmp_path / f"{count}.jsonl", tmp_path / f"{count}.out"
    with source.open("w") as file:
        for number in range(count):
            body = {"prompt": f"number {number} " + "x" * 400, "max_tokens": 4}
            row = {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(row) + "\n")
    with FakeEngine(tmp_path / f"{count}.sock", window=WINDOW) as engine:
        command = [sys.executable, "-c", RUN, engine.endpoint, str(source), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
        assert engine.most_outstanding <= WINDOW
    rows, failed, memory = map(int, done.stdout.split())
    assert (rows, failed) == (count, 0)
    with out.open("rb") as lines:
        assert sum(1 for _ in lines) == count
    source.unlink()
    out.unlink()
    return memory


@pytest.mark.timeout(300)
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    few, many = memory_of(tmp_path, 5_000), memory_of(tmp_path, 35_000)
    assert many - few < 30_000 * 100 + (2 << 20), f"{(many - few) / 30_000:.0f} bytes a line"

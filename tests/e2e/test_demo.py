"""The demo as `make demo` runs it, on fewer records."""

from __future__ import annotations

import re
import subprocess
import sys


def test_the_demo_labels_records_rightly_within_its_budget() -> None:
    command = [sys.executable, "-m", "flexgen_lite", "demo", "--records", "120"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    match = re.search(r"exact match\s*│\s*([\d.]+)%", run.stdout)
    assert match and float(match[1]) > 95, run.stdout
    assert re.search(r"records\s*│\s*120, 0 failed", run.stdout)
    assert "streamed through 3 slots" in run.stderr

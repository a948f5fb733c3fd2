"""The demo as `make demo` runs it, on fewer records."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.compiled_kernels import kernels_folder


def test_the_demo_labels_records_rightly_within_its_budget() -> None:
    """As the first thing ever started here, if something that is compiled has changed: compiling takes memory."""
    command = [sys.executable, "-m", "flexgen_lite", "demo", "--records", "120"]
    env = {**os.environ, "NUMBA_CACHE_DIR": str(kernels_folder("demo"))}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0 and "warning" not in run.stderr, run.stderr
    match = re.search(r"exact match\s*│\s*([\d.]+)%", run.stdout)
    assert match and float(match[1]) > 95, run.stdout
    assert re.search(r"records\s*│\s*120, 0 failed", run.stdout)
    assert "streamed through 3 slots" in run.stderr

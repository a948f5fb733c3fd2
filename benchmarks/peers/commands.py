"""Commands that must succeed, and what they said if they did not."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

PROJECT = Path(__file__).parents[2]


def run_command(command: list[str], variables: Mapping[str, str] | None = None) -> str:
    """Its standard output.

    Raises:
        RuntimeError: it failed; with its last line.
    """
    environment = {**os.environ, **(variables or {})}
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        raise RuntimeError(last_line(run.stdout + run.stderr) or f"exit code {run.returncode}")
    return run.stdout


def last_line(text: str) -> str:
    """The last line that says something, without folders of this machine, at most 300 characters."""
    line = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return re.sub(r"(?:/[\w.+@~-]+)+/", "", line)[:300]

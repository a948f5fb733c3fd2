"""A quantised checkpoint whose making was killed is gone on with, and comes out the same."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_lite.workers.conversion.run import BEGUN
from tests.tiny_models import make_model

pytestmark = pytest.mark.timeout(240)

KILLED = """
import os, signal, sys
from flexgen_lite.cli import main
from flexgen_lite.workers.conversion import run
run.MAX_BYTES, left, write = 40_000, int(sys.argv.pop(1)), run.NewFile.write

def write_or_be_killed(*arguments):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)

run.NewFile.write = write_or_be_killed
main.main()
"""


def quantize(model: Path, target: Path, writes: int, *options: str) -> subprocess.CompletedProcess[str]:
    """Killed at its write number `writes`; 0: not at all."""
    command = [sys.executable, "-c", KILLED, str(writes), "quantize", str(model), "-o", str(target), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def contents(target: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in target.iterdir()}


def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    model, whole, target = make_model("llama", tmp_path / "model"), tmp_path / "whole", tmp_path / "target"
    done = quantize(model, whole, 0)
    assert done.returncode == 0 and "28 weights in 4 bits" in done.stdout, done.stderr
    assert quantize(model, target, 60).returncode == -signal.SIGKILL
    kept = {path: path.stat().st_ino for path in target.glob("*.safetensors")}
    assert kept and (target / BEGUN).exists() and not (target / "config.json").exists()
    for options in (("--group-size", "16"), ("--symmetric",)):
        other = quantize(model, target, 0, *options)
        assert other.returncode == 2 and "with other settings" in other.stderr and "Traceback" not in other.stderr
    assert quantize(model, target, 30).returncode == -signal.SIGKILL
    assert quantize(model, target, 0).returncode == 0
    assert contents(target) == contents(whole)
    assert {path: path.stat().st_ino for path in kept} == kept, "written once"
    assert not any(name.endswith(".part") or name == BEGUN for name in contents(target))

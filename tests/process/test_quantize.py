"""A quantised checkpoint whose making was killed is gone on with, and comes out the same."""

from __future__ import annotations

import hashlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_lite.model.quantization import Quantization
from flexgen_lite.workers.conversion import run
from flexgen_lite.workers.conversion.run import BEGUN
from flexgen_lite.workers.conversion.shards import Shard
from flexgen_lite.workers.serve import UserError
from tests.tiny_models import make_model

pytestmark = pytest.mark.timeout(240)

KILLED = """
import errno, os, signal, sys
from flexgen_lite.cli import main
from flexgen_lite.model.quantization import Quantization
from flexgen_lite.workers.conversion import run
run.MAX_BYTES, left, write = 40_000, int(sys.argv.pop(1)), run.NewFile.write

def write_or_be_killed(*arguments):
    global left
    left -= 1
    if not left and FULL:
        raise OSError(errno.ENOSPC, "No space left on device")
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)

run.NewFile.write = write_or_be_killed
main.main()
"""


def quantize(model: Path, target: Path, writes: int, full: bool = False) -> subprocess.CompletedProcess[str]:
    """Killed at its write number `writes`, or the disk is `full` then; 0: not at all."""
    program = KILLED.replace("FULL", str(full))
    command = [sys.executable, "-c", program, str(writes), "quantize", str(model), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def contents(target: Path) -> dict[str, str]:
    files = [path for path in target.rglob("*") if path.is_file()]
    return {str(path.relative_to(target)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_killed_and_gone_on_with(tmp_path: Path) -> None:
    model, whole, target = make_model("llama", tmp_path / "model"), tmp_path / "whole", tmp_path / "target"
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}", encoding="utf-8")
    done = quantize(model, whole, 0)
    assert done.returncode == 0 and "28 weights in 4 bits" in done.stdout, done.stderr
    assert quantize(model, target, 60).returncode == -signal.SIGKILL
    kept = {path: path.stat().st_ino for path in target.glob("*.safetensors")}
    assert kept and (target / BEGUN).exists() and not (target / "config.json").exists()
    for other in (Quantization(4, 16), Quantization(4, symmetric=True)):
        with pytest.raises(UserError, match="with other settings"):
            run.quantize(model, target, other, 1.0, lambda *_: None)
    full = quantize(model, target, 30, full=True)
    assert full.returncode == 2 and "make room and give the same command again" in full.stderr, full.stderr
    assert "Traceback" not in full.stderr
    (target / BEGUN).write_text('{"made_of": "', encoding="utf-8")  # its writing was cut off
    assert quantize(model, target, 0).returncode == 0
    assert contents(target) == contents(whole)
    assert "additional_chat_templates/tools.jinja" in contents(target)
    assert {path: path.stat().st_ino for path in kept} == kept, "written once"
    assert not any(name.endswith(".part") or name == BEGUN for name in contents(target))


def test_what_a_killed_run_left_is_room_as_far_as_it_takes_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=3 << 20)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: free)
    part = tmp_path / f"model{run.PART}"
    part.write_bytes(b"1" * (1 << 20))
    run._check_room(tmp_path, [Shard("model", (), b"", {}, 3 << 20)], [])
    with part.open("r+b") as file:
        file.truncate(0)
        file.truncate(1 << 30)  # of which nothing is written yet
    with pytest.raises(UserError, match="make room"):
        run._check_room(tmp_path, [Shard("model", (), b"", {}, 3 << 20)], [])

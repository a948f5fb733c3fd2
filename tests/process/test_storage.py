"""Disks and files that fail: never a wrong token, always an error that names the file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flexgen_lite import EngineError, FlexGenLite, SamplingParams
from flexgen_lite.launcher import supervisor
from flexgen_lite.model.checkpoint import CheckpointError, stamp
from flexgen_lite.workers.loader.disk_reader import DiskReader
from tests.fault_injection import Fault, inject, struck
from tests.tiny_models import make_model, ragged_prompts

PROMPTS = ragged_prompts(30, longest=20)
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("opt", tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with FlexGenLite(model, dtype="float32") as engine:
        return tokens(engine)


def tokens(engine: FlexGenLite) -> list[list[int]]:
    return [list(completion.token_ids) for completion in engine.generate(PROMPTS, GREEDY)]


def start(model: Path, **options: object) -> FlexGenLite:
    return FlexGenLite(model, dtype="float32", layer_slots=2, **options)


def many_times(engine: FlexGenLite, expected: list[list[int]]) -> None:
    for _ in range(5):
        assert tokens(engine) == expected


def a_shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[-1]


def test_short_reads(model: Path, expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inject(monkeypatch, tmp_path / "faults", Fault("preadv", 2, "short"))
    with start(model) as engine:
        assert tokens(engine) == expected


def test_a_read_error_that_passes(
    model: Path, expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, tmp_path / "faults", Fault("preadv", 30, "EIO"))
    with start(model) as engine:
        assert tokens(engine) == expected
        assert engine.status().totals["restarts"] == 0
    assert struck(tmp_path / "faults") == {0}


def test_a_read_error_that_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(supervisor, "MOST_LOSSES", 1)  # further engines would end alike
    inject(monkeypatch, tmp_path / "faults", Fault("preadv", 30, "EIO", again=True, times=10_000))
    with (
        start(model) as engine,
        pytest.raises(EngineError, match=r"\.safetensors: reading .* failed: .*; check the disk"),
    ):
        tokens(engine)
    assert_told_in_a_sentence(caplog)


def assert_told_in_a_sentence(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing of it was logged: no traceback, and no part of one."""
    told = [record.getMessage() for record in caplog.records]
    assert not [line for line in told if "loader" in line or "Error" in line or "  File" in line], told


@pytest.mark.parametrize(
    "harm", ["truncated", "emptied", "written to", "appended to", "replaced", "removed", "closed to others", "a pipe"]
)
def test_a_file_that_changes_while_layers_stream(
    harm: str, expected: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was opened is read on, right tokens come of it; what is no longer that ends the engine with a sentence."""
    caplog.set_level("INFO")
    model = make_model("opt", tmp_path / "opt")
    shard = a_shard(model)
    with start(model) as engine:
        assert tokens(engine) == expected
        HARMS[harm](shard)
        if harm in ("replaced", "removed", "closed to others", "a pipe"):  # what was opened is still there
            assert tokens(engine) == expected
            return
        with pytest.raises(EngineError, match=f"^{re.escape(str(shard))} changed while it was in use"):
            tokens(engine)
    assert_told_in_a_sentence(caplog)


def _write(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff" * 8)


def _append(shard: Path) -> None:
    with shard.open("ab") as file:
        file.write(b"\0")


def _replace(shard: Path) -> None:
    copy = shard.parent / "copy"
    copy.write_bytes(b"\xff" * shard.stat().st_size)
    copy.replace(shard)


def _make_pipe(shard: Path) -> None:
    shard.unlink()
    os.mkfifo(shard)


HARMS: dict[str, Callable[[Path], None]] = {
    "truncated": lambda shard: os.truncate(shard, shard.stat().st_size // 2),
    "emptied": lambda shard: os.truncate(shard, 0),
    "written to": _write,
    "appended to": _append,
    "replaced": _replace,
    "removed": Path.unlink,
    "closed to others": lambda shard: shard.chmod(0),
    "a pipe": _make_pipe,
}


@pytest.mark.parametrize("harm", ["written to", "replaced"])
def test_run_batch_while_a_file_changes(harm: str, tmp_path: Path) -> None:
    """One sentence and exit code 1, for the job is not over; or all rows."""
    model = make_model("opt", tmp_path / "opt")
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": [5, 6, 7], "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    with source.open("w") as file:
        for number in range(20):
            row = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(row) + "\n")
    command = [sys.executable, "-m", "flexgen_lite", "run-batch", "-i", str(source), "-o", str(out)]
    options = ["--model", str(model), "--dtype", "float32", "--set", "layer_slots=2", "--set", "max_sequences=2"]
    program = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while not (out.exists() and out.stat().st_size):  # some rows are there: layers stream
        assert program.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    HARMS[harm](a_shard(model))
    _, errors = program.communicate(timeout=100)
    if harm == "replaced":
        assert program.returncode == 0 and len(out.read_bytes().splitlines()) == 20
        return
    told = errors.splitlines()
    assert program.returncode == 1 and "Traceback" not in errors
    assert re.fullmatch(
        rf"error: {re.escape(str(a_shard(model)))} changed while it was in use \(.*\): .* start again; "
        "the same command goes on where it stopped",
        told[-1],
    )
    assert sum("changed while it was in use" in line for line in told) == 1, errors


def test_files_that_change_between_opening_and_reading(tmp_path: Path) -> None:
    """A pipe in the place of a file is not waited for."""
    path = tmp_path / "a"
    path.write_bytes(b"a" * 5000)
    for make in (_make_pipe, _replace):
        reader = DiskReader([str(path)], [stamp(path.stat())])
        make(path)
        with pytest.raises(CheckpointError, match=r"/a (changed while it was in use|cannot be opened)"):
            reader.check_unchanged([0])
        path.unlink()
        path.write_bytes(b"a" * 5000)


def test_a_file_replaced_between_two_loaders(
    expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that is started again does not take another file for the one that the model was opened with."""
    model = make_model("opt", tmp_path / "opt")
    shard = a_shard(model)
    inject(monkeypatch, tmp_path / "faults", Fault("load", 60))
    with start(model) as engine:
        shard.rename(tmp_path / "old")
        shard.write_bytes((tmp_path / "old").read_bytes())
        with pytest.raises(EngineError, match=f"{re.escape(str(shard))} changed while it was in use"):
            many_times(engine, expected)


def test_a_flipped_bit_is_found_when_asked_for(expected: list[list[int]], tmp_path: Path) -> None:
    model = make_model("opt", tmp_path / "opt")
    with start(model) as engine:
        assert tokens(engine) == expected
    shard = a_shard(model)
    before = shard.stat()
    with shard.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        last = file.read(1)
        file.seek(-8, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with (
        pytest.raises(EngineError, match=f"{re.escape(str(shard))}: .* are not what they were"),
        start(model, verify_weights=True) as engine,
    ):
        tokens(engine)

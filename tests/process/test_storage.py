"""Disks and files that fail: never a wrong token, always an error that names the file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from flexgen_lite import EngineError, FlexGenLite, SamplingParams, engine_supervisor
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


def test_a_read_error_that_stays(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_supervisor, "MOST_LOSSES", 1)  # further engines would end alike
    inject(monkeypatch, tmp_path / "faults", Fault("preadv", 30, "EIO", again=True, times=10_000))
    with (
        start(model) as engine,
        pytest.raises(EngineError, match=r"\.safetensors: reading .* failed: .*; check the disk"),
    ):
        tokens(engine)


@pytest.mark.parametrize("harm", ["truncated", "written to", "replaced"])
def test_a_file_that_changes_while_layers_stream(harm: str, expected: list[list[int]], tmp_path: Path) -> None:
    model = make_model("opt", tmp_path / "opt")
    shard = a_shard(model)
    with start(model) as engine:
        assert tokens(engine) == expected
        if harm == "truncated":
            os.truncate(shard, shard.stat().st_size // 2)
        elif harm == "written to":
            with shard.open("r+b") as file:
                file.seek(-8, os.SEEK_END)
                file.write(b"\xff" * 8)
        else:  # what was opened is still there
            copy = tmp_path / "copy"
            copy.write_bytes(b"\xff" * shard.stat().st_size)
            copy.replace(shard)
            assert tokens(engine) == expected
            return
        with pytest.raises(EngineError, match=f"{re.escape(str(shard))} changed while it was in use"):
            tokens(engine)


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

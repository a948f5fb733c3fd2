"""Which calibration is taken, and when one is worth its minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.launcher import calibrate, outlook
from flexgen_lite.plan.workload import Workload

GIB = 1 << 30


def config(model: Path, **values: object) -> EngineConfig:
    return EngineConfig(model=str(model), **values)


def test_what_was_measured_with_more_memory_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (whole,), small = calibrate._files(config(tmp_path)), calibrate._files(config(tmp_path, ram=3 * GIB))
    larger, alike = calibrate._files(config(tmp_path, ram=20 * GIB)), calibrate._files(config(tmp_path, ram=2 * GIB))
    assert small[0] == larger[0] == whole
    assert small[-1] == alike[-1] and small[-1] not in larger
    assert larger[-1] in small[1:-1], "it holds for less as well"
    assert whole not in calibrate._files(config(tmp_path, ram=3 * GIB, dtype="float32"))


def test_projections_on_the_cpu_are_measured_where_weights_are_staged(tmp_path: Path) -> None:
    plain, staged = config(tmp_path, device="cpu"), config(tmp_path, device="cpu", stage_weights=True)
    projected = {one: one.model_copy(update={"cpu_projections": "qkv"}) for one in (plain, staged)}
    none = staged.model_copy(update={"cpu_projections": "none"})
    assert calibrate._files(projected[plain]) == calibrate._files(plain)
    assert calibrate._files(none) == calibrate._files(staged) != calibrate._files(projected[staged])
    assert calibrate.settings_of(projected[staged])["cpu_projections"] == "qkv"
    assert "cpu_projections" not in calibrate.settings_of(projected[plain])
    on_gpu = config(tmp_path, device="cuda", cpu_projections="qkv")
    assert calibrate.settings_of(on_gpu) == calibrate.settings_of(on_gpu, True) != calibrate.settings_of(on_gpu, False)


@pytest.mark.parametrize(
    ("device", "sequences", "is_long"),
    [("cpu", 200_000, True), ("cpu", 1000, False), ("cuda", 200_000, False)],
)
def test_only_long_jobs_are_worth_a_calibration(tmp_path: Path, device: str, sequences: int, is_long: bool) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(2 * GIB)
    job = Workload(sequences, 150, 150, 150)
    assert outlook._is_long(config(tmp_path, device=device), job) is is_long

"""Calibrations of this machine: measured once for each model and its settings, then kept in a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexgen_lite import __version__
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.engine.calibration import Calibration, CalibrationError
from flexgen_lite.launcher.process import EngineProcess
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.plan.disk_rate import read_rate
from flexgen_lite.plan.machine import inspect_machine
from flexgen_lite.text.shown import shown_path

WITHOUT_EFFECT = {
    "model", "ram", "gpu", "trace", "endpoint", "key_file", "max_sequences", "micro_batches", "micro_batch_tokens",
    "layer_slots", "device_slots", "prefix_caching", "kv_disk", "kv_disk_dir", "start_timeout", "worker_timeout",
    "verify_weights", "engines",
}  # fmt: skip
"""Keys that change what is planned, not how fast its parts are."""
DISK_SECONDS = 1.0
GPU_DRIVER = Path("/dev/nvidiactl")
MOST_ROOM = 48  # as a power of two of bytes
_SECONDS = 300.0  # for all that is measured


def calibrate(config: EngineConfig, on_log: Callable[[str], None] | None = None) -> Calibration:
    """Measures, in a minute or less behind the start of an engine.

    Raises:
        EngineError: an engine with this configuration cannot be started.
    """
    with EngineProcess(config, on_log=on_log, wait=False, calibrate=True) as engine:
        found = Calibration.from_dict(engine.wait_until_calibrated(config.start_timeout + _SECONDS))
    return replace(found, settings=settings_of(config))


def calibrated(
    config: EngineConfig, on_log: Callable[[str], None], again: bool = False, named: str = ""
) -> Calibration:
    """What is kept, or else measured now and kept.

    Args:
        again: measure, whatever is kept.
        named: what is told of the settings.

    Raises:
        EngineError: an engine with this configuration cannot be started.
    """
    kept = None if again else known(config)
    if kept is not None:
        return kept
    of = f"{shown_path(config.model)}, {named}" if named else shown_path(config.model)
    on_log(f"measuring how fast this machine is with {of}: about a minute, once")
    found = calibrate(config, on_log)
    with contextlib.suppress(OSError, RuntimeError):  # it is measured again the next time
        write(found, _files(config)[-1])
    return found


def disk_now(spec: ModelSpec) -> float | None:
    """Bytes per second of the weights' files; None where there are none."""
    return read_rate([Path(file) for file in spec.files], DISK_SECONDS)[0] if spec.files else None


def known(config: EngineConfig) -> Calibration | None:
    """What is kept of the model as it is now, if there is any."""
    with contextlib.suppress(RuntimeError):  # there is no home directory
        for file in _files(config):
            with contextlib.suppress(OSError, CalibrationError):
                found = read(file)
                if _is_unchanged(found.opened.spec):
                    return found
    return None


def read(path: Path) -> Calibration:
    """
    Raises:
        OSError: it cannot be read.
        CalibrationError: it holds none.
    """
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise CalibrationError(f"{shown_path(path)} is no calibration: {error}") from error
    try:
        return Calibration.from_dict(values)
    except CalibrationError as error:
        raise CalibrationError(f"{shown_path(path)}: {error}") from error


def write(calibration: Calibration, path: Path) -> None:
    """Raises OSError where it cannot be written; a file that is there is replaced as a whole."""
    text = json.dumps(calibration.to_dict())
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def settings_of(config: EngineConfig, on_gpu: bool | None = None) -> dict[str, Any]:
    """Keys that decide what is measured, beside the model. `on_gpu`: as it came out; None: as it looks."""
    found = {key: value for key, value in json.loads(config.to_json()).items() if key not in WITHOUT_EFFECT}
    if found["cpu_projections"] != "qkv" or not stages_weights(config, on_gpu):
        del found["cpu_projections"]
    return found


def stages_weights(config: EngineConfig, on_gpu: bool | None = None) -> bool:
    """Whether layers are copied to a device; `on_gpu` as above."""
    if config.stage_weights is not None:
        return config.stage_weights
    return not looks_like_cpu(config) if on_gpu is None else on_gpu


def looks_like_cpu(config: EngineConfig) -> bool:
    """Before an engine has opened its device."""
    return config.device == "cpu" or (config.device == "auto" and not GPU_DRIVER.exists())


def _files(config: EngineConfig) -> list[Path]:
    """Named after what decides about rates; its own is the last. Those before it were measured without a budget or with
    a larger one, by powers of two, which measures more."""
    machine = inspect_machine()
    described = Path(config.model) / "config.json"
    shape = described.read_bytes() if described.is_file() else b""
    where = {"cpus": machine.cpus, "threads": machine.num_threads, "processor": _processor(), "version": __version__}
    model = os.path.realpath(config.model) if os.path.exists(config.model) else config.model
    text = json.dumps([settings_of(config) | {"model": model}, where], sort_keys=True)
    digest = hashlib.blake2b(text.encode() + shape, digest_size=8).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    rooms = [""] if config.ram is None else ["", *(f"-{n}" for n in range(MOST_ROOM, config.ram.bit_length() - 1, -1))]
    folder = base / "flexgen-lite" / "calibrations"
    return [folder / f"{Path(config.model).name[:60]}-{digest}{room}.json" for room in rooms]


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "CPU part")):
                return line.partition(":")[2].strip()
    return ""


def _is_unchanged(spec: ModelSpec) -> bool:
    with contextlib.suppress(OSError):
        for file, stamp in zip(spec.files, spec.stamps, strict=True):
            now = os.stat(file)
            if (now.st_size, now.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
                return False
        return True
    return False

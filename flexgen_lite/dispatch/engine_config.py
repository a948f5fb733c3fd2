"""What each of several engines is configured with, and may expect."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.plan.engine_parts import EnginePart
from flexgen_lite.plan.machine import Machine
from flexgen_lite.plan.plan import auto_ram
from flexgen_lite.plan.shared import IN_FRONT_BYTES
from flexgen_lite.plan.workload import Workload


def own_ram(config: EngineConfig, machine: Machine) -> int:
    """Bytes of main memory that all engines together may take; none or fewer where there is too little."""
    return (config.ram or auto_ram(machine)) - IN_FRONT_BYTES


def config_of(
    config: EngineConfig, part: EnginePart, count: int, kv_disk_folder: Path, dtype: str = ""
) -> EngineConfig:
    """What an engine is configured with.

    Args:
        kv_disk_folder: where that of the whole is.
        dtype: what "auto" came to in another engine.
    """
    number = part.number
    update: dict[str, Any] = {
        "engines": 1,
        "device": part.device,
        "endpoint": None,
        "key_file": None,
        "trace": None if config.trace is None else trace_of(config.trace, number),
    }
    if dtype and config.dtype == "auto":
        update["dtype"] = dtype
    if config.kv_disk is not None:
        update["kv_disk"] = max(1, config.kv_disk // count)
        update["kv_disk_dir"] = kv_disk_folder / f"engine-{number}"
    return config.model_copy(update=update)


def trace_of(path: Path, number: int) -> Path:
    return path.with_stem(f"{path.stem}-engine{number}")


def work_of(expected: Workload | None, count: int) -> Workload | None:
    """What an engine may expect of the whole."""
    if expected is None:
        return None
    return replace(expected, sequences=-(-expected.sequences // count))

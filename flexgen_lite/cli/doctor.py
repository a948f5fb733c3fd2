"""What this machine offers, and what "auto" makes of it: one line a subject, for people and bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from flexgen_lite import __version__
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.plan.disk_rate import READS, read_rate
from flexgen_lite.plan.machine import Machine, cgroup_free_bytes, inspect_machine
from flexgen_lite.plan.need import num_attention_workers
from flexgen_lite.plan.plan import auto_ram
from flexgen_lite.text.shown import shown_path
from flexgen_lite.text.sizes import format_size

PACKAGES = ("torch", "transformers", "pyzmq", "msgpack", "numpy", "numba", "greenlet", "safetensors", "tokenizers")
INSTRUCTIONS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
READ_SECONDS = 2.0


def examine(model: Path | None = None) -> Iterator[tuple[str, str]]:
    """(subject, finding) pairs, as they are found out.

    Args:
        model: a model directory, whose largest file is read for two seconds to measure the disk, or a GGUF file.

    Raises:
        FileNotFoundError: `model` has no file of weights.
    """
    from flexgen_lite.workers.compute.device import cuda_devices

    machine = inspect_machine()
    yield "processors", _processors(machine)
    yield "instructions", ", ".join(_instructions()) or "none that the kernels use"
    yield "memory", _memory(machine)
    yield "/dev/shm", _shared_memory()
    gpus = [f"{name}, {format_size(num_bytes)}" for name, num_bytes in cuda_devices()]
    yield "GPU", "; ".join(gpus) or "none that PyTorch sees"
    yield "disk", "not measured: give --model" if model is None else _disk(model)
    config = EngineConfig(model=str(model or "model"))
    workers = num_attention_workers(config, machine)
    yield (
        "auto",
        f"device {'cuda' if gpus else 'cpu'}, ram {format_size(auto_ram(machine))}, {workers} attention "
        f"worker{'s' * (workers > 1)}, {machine.num_threads} threads; the rest depends on the model: see the plan that "
        "launch prints",
    )
    yield "versions", _versions()


def _processors(machine: Machine) -> str:
    parts = [f"{len(machine.cpus)} of {os.cpu_count()} usable"]
    if machine.cores is not None:
        parts.append(f"on {machine.cores} cores")
    if machine.quota is not None:
        parts.append(f"limited to {machine.quota} by the cgroup")
    parts.append(f"{machine.numa_nodes} NUMA node{'s' * (machine.numa_nodes > 1)}")
    return f"{', '.join(parts)} ({_processor_name()})"


def _processor_name(path: Path = Path("/proc/cpuinfo")) -> str:
    found = re.search(r"^model name\s*: (.+)$", _text(path), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _instructions(path: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those of `INSTRUCTIONS` that the processor has."""
    found = re.search(r"^(?:flags|Features)\s*: (.+)$", _text(path), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return [name for name in INSTRUCTIONS if name in flags]


def _memory(machine: Machine) -> str:
    limit = cgroup_free_bytes()
    where = "the machine" if limit is None or limit > machine.available_ram else "the memory cgroup"
    return f"{format_size(machine.available_ram)} can be taken, by what {where} has left"


def _shared_memory() -> str:
    kind = "tensors are in anonymous memory files, its size does not matter"
    try:
        return f"{format_size(shutil.disk_usage('/dev/shm').free)} free; {kind}"
    except OSError:
        return f"not there; {kind}"


def _disk(model: Path) -> str:
    kinds = ("*.safetensors", "*.gguf")
    found = [model] if model.is_file() else [path for kind in kinds for path in model.glob(kind) if path.is_file()]
    files = sorted(found, key=lambda path: path.stat().st_size)
    if not files:
        raise FileNotFoundError(f"{shown_path(model)} has no .safetensors and no .gguf file: give a model")
    rate, num_bytes, direct = read_rate(files[-1:], READ_SECONDS)
    kind = "direct reads" if direct else "reads through the page cache, for its file system has no direct ones,"
    how = f"{kind} with {READS} at once"
    note = "" if num_bytes >= 64 << 20 else "; too little for a fair figure"
    return f"{rate / 1e9:.2f} GB/s, {how} of {format_size(num_bytes)} of {files[-1].name}{note}"


def _versions() -> str:
    found = [f"flexgen-lite {__version__}", f"Python {platform.python_version()}", f"Linux {platform.release()}"]
    return ", ".join([*found, *(f"{name} {_version(name)}" for name in PACKAGES)])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""

"""What the numbers were measured on and with; nothing that tells whose machine it is."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

from benchmarks.peers.commands import PROJECT

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def conditions() -> dict[str, str]:
    """Date, processor, its features for matrix products, cores, RAM, commit."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(values.get("flags", "").split())
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        "processor": values.get("model name", platform.machine()),
        "features": " ".join(flag for flag in FLAGS if flag in flags),
        "cores": str(len(os.sched_getaffinity(0))),
        "ram": f"{ram / 2**30:.0f} GiB",
        "kernel": platform.release().split("-")[0],
        "commit": commit(),
    }


def commit() -> str:
    """Of this project; "with changes" where the working tree differs from it."""
    head, changes = _git("rev-parse", "--short", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return f"{head or 'unknown'}{' with changes' if changes else ''}"


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=PROJECT, capture_output=True, text=True, check=False)
    return run.stdout.strip()

"""Whether the disk has room for a model, before it is written. Standard library only."""

from __future__ import annotations

import shutil
from pathlib import Path

SPARE_BYTES = 2 << 30


def require_room(folder: Path, num_bytes: float) -> None:
    """
    Raises:
        RuntimeError: the disk of `folder` would have less than SPARE_BYTES left.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes + SPARE_BYTES > free:
        needed, left = (f"{count / 1e9:.1f} GB" for count in (num_bytes, free))
        raise RuntimeError(f"needs {needed} of disk and some to spare, {left} are free: remove models from the cache")


def size_of(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)

"""Where tests keep kernels that are compiled apart from the engine's own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numba

ROOT = Path(__file__).parents[1]


def kernels_folder(name: str) -> Path:
    """For NUMBA_CACHE_DIR: empty where something that is compiled has changed, which numba itself would not see."""
    content = b"".join(path.read_bytes() for path in sorted((ROOT / "workers").rglob("*.py")))
    digest = hashlib.blake2b(content + numba.__version__.encode(), digest_size=8).hexdigest()
    return ROOT / ".pytest_cache" / f"kernels-{name}-{digest}"

"""Kernels that are not in numba's cache are compiled by a child, or here if that dies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiled_kernels import ROOT

PROGRAM = """
import os
import shutil
from numba import cfunc, njit, types
from numba.core import event
from flexgen_lite.workers.kernel_cache import from_cache

@njit(cache=True)
def twice(x):
    return 2 * x

def add(x):
    return twice(x) + 1

def load():
    if CHILD_DIES and os.getpid() != parent:
        os.kill(os.getpid(), 9)
    return twice(20), cfunc(types.int64(types.int64), cache=True)(add).ctypes(20)

parent = os.getpid()
with event.install_recorder("numba:run_pass") as recorder:
    result = from_cache(load)
print(result, *sorted({record.data["qualname"] for _, record in recorder.buffer if "lowering" in record.data["name"]}))
"""


@pytest.mark.parametrize("child_dies", [False, True])
def test_who_compiles(tmp_path: Path, child_dies: bool) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.replace("CHILD_DIES", str(child_dies)), encoding="utf-8")
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    outputs = [
        subprocess.run(
            [sys.executable, tmp_path / "program.py"], env=env, capture_output=True, text=True, check=True, timeout=60
        ).stdout
        for _ in range(2)
    ]
    assert outputs[1] == "(40, 41)\n", "from the cache"
    assert outputs[0] == ("(40, 41) add twice\n" if child_dies else outputs[1])


CAST = """
import numpy as np
from flexgen_lite.workers.loader.cast_kernels import KERNELS
source = np.float32([1, 2]).view(np.uint32)
KERNELS["float32", "bfloat16"](source, np.empty(2, np.uint16))
print(sum(kernel.stats.cache_misses.total() for kernel in KERNELS.values()))
"""


def test_a_change_in_any_file_of_kernels_compiles_anew(tmp_path: Path) -> None:
    """As an upgrade is: by itself numba looks at the function's own file alone."""
    for name in ("flexgen_lite", "workers"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)}

    def num_compiled() -> int:
        run = subprocess.run([sys.executable, "-c", CAST], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    assert (num_compiled(), num_compiled()) == (1, 0)
    with (tmp_path / "workers" / "simd.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert (num_compiled(), num_compiled()) == (1, 0)

"""Kernels that are not in numba's cache are compiled by a child, or here if that dies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core import caching

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
    if os.getpid() != parent:
        open(os.path.join(os.path.dirname(__file__), f"child-{os.getpid()}"), "w").close()
    return twice(20), cfunc(types.int64(types.int64), cache=True)(add).ctypes(20)

parent = os.getpid()
with event.install_recorder("numba:run_pass") as recorder:
    result = from_cache(load, "test")
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


def test_one_compiles_for_all_who_start_together(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM.replace("CHILD_DIES", "False"), encoding="utf-8")
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    runs = [
        subprocess.Popen([sys.executable, tmp_path / "program.py"], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [run.communicate(timeout=60)[0] for run in runs] == ["(40, 41)\n"] * 3
    assert len(list(tmp_path.glob("child-*"))) == 1
    assert not list(tmp_path.glob("flexgen-lite-*")), "the lock's file is left behind"


CAST = """
import numpy as np
from flexgen_lite.workers.loader.cast_kernels import KERNELS
source = np.float32([1, 2]).view(np.uint32)
KERNELS["float32", "bfloat16"](source, np.empty(2, np.uint16))
print(sum(kernel.stats.cache_misses.total() for kernel in KERNELS.values()))
"""


def _copied(folder: Path) -> dict[str, str]:
    """The environment for a copy of the packages there."""
    for name in ("flexgen_lite", "workers"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return {**os.environ, "NUMBA_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(folder)}


def test_a_change_in_any_file_of_kernels_compiles_anew(tmp_path: Path) -> None:
    """As an upgrade is: by itself numba looks at the function's own file alone."""
    env = _copied(tmp_path)

    def num_compiled() -> int:
        run = subprocess.run([sys.executable, "-c", CAST], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return int(run.stdout)

    assert (num_compiled(), num_compiled()) == (1, 0)
    with (tmp_path / "workers" / "simd.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert (num_compiled(), num_compiled()) == (1, 0)


STALE = CAST.replace("source =", "import pathlib, sys\nexec(sys.argv[1])\nsource =")


def test_code_that_was_imported_before_a_change_is_not_kept_as_the_new(tmp_path: Path) -> None:
    """As by a worker of an engine that runs while it is upgraded."""
    env = _copied(tmp_path)
    simd = tmp_path / "workers" / "simd.py"
    upgrade = f"pathlib.Path({str(simd)!r}).open('a').write('# changed')"
    for code in (upgrade, "0"):
        run = subprocess.run(
            [sys.executable, "-c", STALE, code], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert run.stdout == "1\n", run.stderr


SAVE = """
import pathlib, sys, time
from numba import njit
from numba.core import caching
from flexgen_lite.workers.kernel_cache import guard
guard()
files, me = caching.IndexDataCacheFile(sys.argv[1], "kernel", "stamp"), sys.argv[2]
dump = files._save_data
files._save_data = lambda name, data: (time.sleep(0.1), dump(name, data))
for number in range(5):
    files.save((me, number), (me, number))
"""


def test_who_save_kernels_of_one_name_at_once_take_files_of_their_own(tmp_path: Path) -> None:
    """numba's index names the file before it is written, and another may choose the same."""
    savers = [subprocess.Popen([sys.executable, "-c", SAVE, str(tmp_path), name]) for name in "abc"]
    assert [saver.wait(timeout=60) for saver in savers] == [0, 0, 0]
    files = caching.IndexDataCacheFile(str(tmp_path), "kernel", "stamp")
    keys = [(name, number) for name in "abc" for number in range(5)]
    assert [files.load(key) for key in keys] == keys

"""The built wheel, as somebody else would install it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECK = """
import pathlib, sys, flexgen_lite, flexgen_lite.workers.serve, flexgen_lite.cli.main, flexgen_lite.cli.demo as demo
for module in (flexgen_lite, flexgen_lite.workers.serve):
    assert pathlib.Path(sys.argv[1]) in pathlib.Path(module.__file__).parents, module.__file__
assert (demo.MODEL / "model.safetensors").is_file()
print(flexgen_lite.__version__)
"""


def test_the_wheel_holds_all_that_it_needs_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, files.stdout.decode().split("\0")):  # a clean copy: nothing built is left in the tree
        if not (ROOT / name).is_file() or (ROOT / name).is_symlink():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)],
        check=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "flexgen_lite",
        f"flexgen_lite-{wheel.name.split('-')[1]}.dist-info",
    }
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "flexgen_lite").rglob("*.py")}
    modules |= {f"flexgen_lite/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "workers").rglob("*.py")}
    data = {"flexgen_lite/py.typed", "flexgen_lite/report/page.html", "flexgen_lite/demo/model/tokenizer.json"}
    assert modules | data <= set(names)
    assert not [name for name in names if "test" in name.lower()]
    target = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), str(wheel)], check=True, timeout=120)
    run = subprocess.run(
        [sys.executable, "-c", CHECK, str(target)],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(target)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == wheel.name.split("-")[1]

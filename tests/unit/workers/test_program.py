"""How a worker's program is imported."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
import gc, importlib, sys
from pathlib import Path

folder = Path({folder!r})
for name in ("accelerate", "scipy", "sklearn"):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("FOUND = True")
sys.path.insert(0, str(folder))

from flexgen_lite.workers.__main__ import imported
program = imported("flexgen_lite.workers.attention.worker")
assert callable(program.main) and "numba" in sys.modules
assert gc.isenabled() and gc.get_freeze_count() > 1000
for name in ("accelerate", "scipy", "sklearn"):
    assert name not in sys.modules, name
    assert importlib.import_module(name).FOUND, "a model's own code may need it"
"""


def test_packages_that_no_kernel_needs_stay_outside(tmp_path: object) -> None:
    subprocess.run([sys.executable, "-c", CHECK.format(folder=str(tmp_path))], check=True)

"""One worker process: `python -m flexgen_lite.workers loader|attention|compute ...`."""

from __future__ import annotations

import gc
import importlib
import sys
import types

UNUSED = ("accelerate", "scipy", "sklearn")
"""Packages that Transformers and numba import where they are installed, and that neither a forward nor a kernel
needs: a quarter of the time and 40 MB of the memory that a compute worker takes to start."""


def main() -> None:
    module = imported(f"flexgen_lite.workers.{sys.argv.pop(1)}.worker")
    module.main()


def imported(name: str) -> types.ModuleType:
    """The worker's program, imported in little time.

    The garbage collector finds nothing in a million objects of modules, again and again: it is off meanwhile, and
    leaves them alone for good. Unused packages look absent meanwhile; a model's own code may import them later.
    """
    gc.disable()
    hidden = [package for package in UNUSED if package not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: the import system's word for absent
    try:
        program = importlib.import_module(name)
        if "numba" in sys.modules:
            importlib.import_module("numba.np.arraymath")  # would look for SciPy at the first kernel
        return program
    finally:
        for package in hidden:
            del sys.modules[package]
        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    main()

"""Every benchmark can be imported: nobody runs them all after a name has changed."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest

import benchmarks

MODULES = sorted(path.stem for path in Path(benchmarks.__path__[0]).glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", MODULES)
def test_it_can_be_imported(name: str) -> None:
    if name == "ray_data" and importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is in an environment of its own: make test-ray")
    importlib.import_module(f"benchmarks.{name}")

"""Settings of all tests."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

import pytest
from hypothesis import settings

from flexgen_lite.engine.zygote import SHARED
from flexgen_lite.launcher import process
from tests.coordinators import Coordinators
from tests.zygotes import Zygotes

settings.register_profile("default", deadline=None)  # no assertion on wall time: the machine may be busy
settings.load_profile("default")

SLOWEST = (
    "test_older_processors.py", "test_answers.py", "test_memory_pressure.py", "test_outlive.py", "test_families.py",
    "test_published_formats.py", "test_worker_loss.py", "test_bad_clients.py", "test_zygote.py", "test_storage.py",
    "test_serve_life.py", "test_lm_eval.py", "test_sampling_options.py", "test_resume.py", "test_bad_input.py",
    "test_scores.py", "test_budget.py", "test_engine_death.py", "test_prefix_sharing.py", "test_soak_short.py",
    "test_dispatch.py", "test_many_lines.py", "test_published_engines.py", "test_kv_disk_loss.py", "test_kv_disk.py",
)  # fmt: skip
THREADS = len(os.sched_getaffinity(0))
_cache = tempfile.mkdtemp(prefix="flexgen-lite-cache-")
os.environ["XDG_CACHE_HOME"] = _cache  # of checksums; the user's own is left alone
os.environ["OMP_WAIT_POLICY"] = "passive"  # as in the workers: pytest's processes have more threads than there are CPUs


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and SHARED not in os.environ:  # one set for all processes of pytest-xdist
        config.add_cleanup(Zygotes().close)
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        process._spawn = Coordinators().spawn


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: the processes of pytest-xdist end at about the same time."""
    place = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Beside an engine's processes there is no processor for a second thread here: it would only look out for work."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1 if {"e2e", "process"} & set(item.path.parts) else THREADS)


def pytest_unconfigure() -> None:
    shutil.rmtree(_cache, ignore_errors=True)

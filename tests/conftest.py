"""Settings of all tests."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
from hypothesis import settings

from tests.zygotes import Zygotes

settings.register_profile("default", deadline=None)  # no assertion on wall time: the machine may be busy
settings.load_profile("default")

_cache = tempfile.mkdtemp(prefix="flexgen-lite-cache-")
os.environ["XDG_CACHE_HOME"] = _cache  # of checksums; the user's own is left alone


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # one set for all processes of pytest-xdist
        config.add_cleanup(Zygotes().close)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: the processes of pytest-xdist end at about the same time."""
    items.sort(key=lambda item: "test_older_processors" not in item.nodeid)


def pytest_unconfigure() -> None:
    shutil.rmtree(_cache, ignore_errors=True)

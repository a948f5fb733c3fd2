"""Settings of all tests."""

from __future__ import annotations

import os
import shutil
import tempfile

from hypothesis import settings

settings.register_profile("default", deadline=None)  # no assertion on wall time: the machine may be busy
settings.load_profile("default")

_cache = tempfile.mkdtemp(prefix="flexgen-lite-cache-")
os.environ["XDG_CACHE_HOME"] = _cache  # of checksums; the user's own is left alone


def pytest_unconfigure() -> None:
    shutil.rmtree(_cache, ignore_errors=True)

"""Fixtures of tests with real processes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_lite.engine.zygote import SHARED


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A private place for runtime directories; nothing may be left in it, nor in /dev/shm.

    Its path is short, as that of a socket has to be.
    """
    shm_before = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory(prefix="fgl-") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder)
        assert os.listdir(folder) == []
    assert set(os.listdir("/dev/shm")) <= shm_before


@pytest.fixture
def own_zygotes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines start as they do for users: no worker is forked from a zygote of the tests."""
    monkeypatch.delenv(SHARED)

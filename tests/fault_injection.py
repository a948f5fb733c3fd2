"""Faults in real worker processes: a worker's n-th call of a function kills it, stops it, or raises.

A `sitecustomize` on the workers' PYTHONPATH wraps the functions before anything runs; those that are forked from a
zygote of the tests (zygotes.py) are wrapped there. Each fault strikes once, whichever process of that name comes by.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from tests.fault_places import FAULTS

SITECUSTOMIZE = """
import sys
from pathlib import Path
from tests import fault_places

fault_places.wrap_asked(" ".join(sys.orig_argv), Path(__file__).parent)
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """`place`: one of fault_places.PLACES. `worker`: a part of its name. `action`: "SIGKILL", "SIGSTOP", "SIGSEGV",
    "raise", "exit", or at a "preadv" "EIO" or "short" (every `call`-th read gives a third of what is wanted), at a
    "pwritev" "ENOSPC", after a "preadv of KV" "garble". `token`: strike when a micro-batch has it, whatever `call`;
    `rows`: when it has more than so many. `again`: strike in every process; `times`: so many calls in a row."""

    place: str
    call: int = 1
    action: str = "SIGKILL"
    after: bool = False
    worker: str = "worker"
    token: int | None = None
    rows: int | None = None
    again: bool = False
    times: int = 1


def inject(monkeypatch: pytest.MonkeyPatch, folder: Path, *faults: Fault) -> None:
    """The engines started from now on meet these faults."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv(FAULTS, json.dumps([asdict(fault) for fault in faults]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *(path for path in sys.path if path)]))


def struck(folder: Path) -> set[int]:
    """The faults that have struck, by their place in the list."""
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()}


def until_all_struck(folder: Path, count: int, rounds: int = 5) -> Iterator[None]:
    """Rounds of work, until all of so many faults have struck; that they have is asserted."""
    for _ in range(rounds):
        yield
        if struck(folder) == set(range(count)):
            return
    raise AssertionError(f"of {count} faults only {sorted(struck(folder))} have struck")

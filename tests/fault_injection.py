"""Faults in real worker processes: a worker's n-th call of a function kills it, stops it, or raises.

Workers are fresh interpreters: a `sitecustomize` on their PYTHONPATH wraps the functions before anything runs. Each
fault strikes once, whichever process of that name comes by.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

SITECUSTOMIZE = """
import errno, importlib, json, os, signal, sys
from pathlib import Path

PLACES = {
    "advance": ("compute", "flexgen_lite.workers.compute.forward", "Forward", "advance"),
    "leave": ("compute", "flexgen_lite.workers.compute.forward", "Forward", "leave"),
    "open": ("compute", "flexgen_lite.workers.compute.products", "Products", "__init__"),
    "pack": ("compute", "flexgen_lite.workers.compute.products", "Products", "pack"),
    "begin": ("attention", "flexgen_lite.workers.attention.state", "AttentionState", "begin"),
    "attend": ("attention", "flexgen_lite.workers.attention.state", "AttentionState", "attend"),
    "load": ("loader", "flexgen_lite.workers.loader.state", "LoaderState", "load"),
    "preadv": ("loader", "os", None, "preadv"),
}

def strike(action, name):
    if action == "raise":
        raise RuntimeError("injected: " + name)
    if action == "EIO":
        raise OSError(errno.EIO, "injected")
    if action == "exit":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, action))

def wrap(place, faults, folder):
    _, module, owner, name = PLACES[place]
    cls = importlib.import_module(module)
    cls = getattr(cls, owner) if owner else cls
    function, calls = getattr(cls, name), 0

    def wrapped(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if any(f["action"] == "short" and calls % f["call"] == 0 for _, f in faults):
            args = ([args[0][0][: max(1, len(args[0][0]) // 3)]], *args[1:])
        plain = [(i, f) for i, f in faults if f["token"] is f["rows"] is None and f["action"] != "short"]
        struck = [(i, f) for i, f in plain if f["call"] <= calls < f["call"] + f["times"]]
        batch = getattr(self, "_batch", None)
        struck += [(i, f) for i, f in faults if f["token"] is not None and batch and f["token"] in batch.token_ids]
        struck += [(i, f) for i, f in faults if f["rows"] is not None and batch and len(batch.token_ids) > f["rows"]]
        def hit(after):
            for i, f in struck:
                marker = folder / str(i)
                if f["after"] == after and (f["again"] or f["times"] > 1 or not marker.exists()):
                    marker.touch()
                    strike(f["action"], name)
        hit(False)
        result = function(self, *args, **kwargs)
        hit(True)
        return result

    setattr(cls, name, wrapped)

command = " ".join(sys.orig_argv)
given = json.loads(os.environ["FLEXGEN_LITE_TEST_FAULTS"])
for place, (kind, *_) in PLACES.items():
    faults = [(i, f) for i, f in enumerate(given) if f["place"] == place and f["worker"] in command]
    if faults and f"flexgen_lite.workers {kind} " in command:
        importlib.import_module("flexgen_lite.workers.__main__").imported(f"flexgen_lite.workers.{kind}.worker")
        del sys.modules["flexgen_lite.workers.__main__"]  # which is about to run
        wrap(place, faults, Path(__file__).parent)
"""


@dataclass(frozen=True, slots=True)
class Fault:
    """`worker`: a part of its name. `action`: "SIGKILL", "SIGSTOP", "SIGSEGV", "raise", "exit", or at a "preadv" "EIO"
    or "short" (every `call`-th read gives a third of what is wanted). `token`: strike when a micro-batch has it,
    whatever `call`; `rows`: when it has more than so many. `again`: strike in every process; `times`: so many
    calls in a row."""

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
    monkeypatch.setenv("FLEXGEN_LITE_TEST_FAULTS", json.dumps([asdict(fault) for fault in faults]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *(path for path in sys.path if path)]))


def struck(folder: Path) -> set[int]:
    """The faults that have struck, by their place in the list."""
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()}

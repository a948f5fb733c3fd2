"""Inside a worker process: wraps the functions where faults are to strike (fault_injection.py)."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

FAULTS = "FLEXGEN_LITE_TEST_FAULTS"
PLACES: dict[str, tuple[str, str, str | None, str]] = {
    "advance": ("compute", "flexgen_lite.workers.compute.forward", "Forward", "advance"),
    "leave": ("compute", "flexgen_lite.workers.compute.forward", "Forward", "leave"),
    "mix": ("compute", "flexgen_lite.workers.compute.forward", "Forward", "mix"),
    "put": ("compute", "flexgen_lite.workers.compute.state_store", "StateStore", "put"),
    "open": ("compute", "flexgen_lite.workers.compute.products", "Products", "__init__"),
    "pack": ("compute", "flexgen_lite.workers.compute.products", "Products", "pack"),
    "begin": ("attention", "flexgen_lite.workers.attention.state", "AttentionState", "begin"),
    "attend": ("attention", "flexgen_lite.workers.attention.state", "AttentionState", "attend"),
    "load": ("loader", "flexgen_lite.workers.loader.state", "LoaderState", "load"),
    "preadv": ("loader", "os", None, "preadv"),
    "park": ("loader", "flexgen_lite.workers.loader.kv_disk", "KvDisk", "_write"),
    "fetch": ("loader", "flexgen_lite.workers.loader.kv_disk", "KvDisk", "_read"),
    "pwritev": ("loader", "os", None, "pwritev"),
    "preadv of KV": ("loader", "flexgen_lite.workers.loader.direct_file", "DirectFile", "read"),
}


def wrap_asked(command: str, folder: Path) -> None:
    """`command`: of the process; `folder`: where a fault that has struck leaves its mark."""
    given = json.loads(os.environ[FAULTS])
    for place, (kind, *_) in PLACES.items():
        faults = [(i, f) for i, f in enumerate(given) if f["place"] == place and f["worker"] in command]
        if faults and f"flexgen_lite.workers {kind} " in command:
            if "flexgen_lite.workers.__main__" not in sys.modules:
                importlib.import_module("flexgen_lite.workers.__main__").imported(f"flexgen_lite.workers.{kind}.worker")
                del sys.modules["flexgen_lite.workers.__main__"]  # which is about to run
            _wrap(place, faults, folder)


def _wrap(place: str, faults: list[tuple[int, dict[str, Any]]], folder: Path) -> None:
    _, module, owner, name = PLACES[place]
    cls = importlib.import_module(module)
    cls = getattr(cls, owner) if owner else cls
    function, calls = getattr(cls, name), 0

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if any(f["action"] == "short" and calls % f["call"] == 0 for _, f in faults):
            args = ([args[0][0][: max(1, len(args[0][0]) // 3)]], *args[1:])
        plain = [(i, f) for i, f in faults if f["token"] is f["rows"] is None and f["action"] != "short"]
        struck = [(i, f) for i, f in plain if f["call"] <= calls < f["call"] + f["times"]]
        batch = getattr(self, "_batch", None)
        struck += [(i, f) for i, f in faults if f["token"] is not None and batch and f["token"] in batch.token_ids]
        struck += [(i, f) for i, f in faults if f["rows"] is not None and batch and len(batch.token_ids) > f["rows"]]

        def hit(after: bool) -> None:
            for i, f in struck:
                marker = folder / str(i)
                if f["after"] == after and (f["again"] or f["times"] > 1 or not marker.exists()):
                    marker.touch()
                    _strike(f["action"], name, args)

        hit(False)
        result = function(self, *args, **kwargs)
        hit(True)
        return result

    setattr(cls, name, wrapped)


def _strike(action: str, name: str, args: tuple[Any, ...]) -> None:
    if action == "garble":
        args[0][0] ^= 0xFF
        return
    if action == "raise":
        raise RuntimeError("injected: " + name)
    if action in ("EIO", "ENOSPC"):
        raise OSError(getattr(errno, action), "injected")
    if action == "exit":
        os._exit(3)
    os.kill(os.getpid(), getattr(signal, action))

"""Zygotes that all engines of a test run share: their workers are forked, which takes milliseconds, not seconds.

`python -m tests.zygotes KIND SOCKET` imports what the workers of that kind import when the first engine connects, and
each engine gets a zygote of its own, forked from this one. An engine that was started otherwise than this process (with
other environment variables, in a control group, with other limits) gets none: its workers are fresh processes.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from flexgen_lite.engine.worker_supervisor import COMPUTE_ENVIRONMENT, ENVIRONMENT
from flexgen_lite.engine.zygote import SHARED
from flexgen_lite.workers import zygote
from flexgen_lite.workers.__main__ import imported
from tests import fault_places
from tests.fault_places import FAULTS

QUICKER = ("opt", "llama", "gpt2")  # that most tests use
KINDS = ("compute", "attention", "loader")
SET_LATE = {"XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "TMPDIR", "HF_HUB_OFFLINE"}  # nothing reads them while it is imported
OF_NO_MATTER = {
    "PYTEST_CURRENT_TEST", "PYTEST_VERSION", "COLUMNS", "LINES", "TERM", "NO_COLOR", "FORCE_COLOR", "PWD", "OLDPWD",
    "SHLVL", "_", SHARED, FAULTS, "FAKE_COORDINATOR_STARTS", "HF_XET_HIGH_PERFORMANCE", "TORCHINDUCTOR_CACHE_DIR",
    "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK",
}  # fmt: skip


class Zygotes:
    """The processes, one for each kind; they end with this one, too."""

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="fgl-zygotes-"))
        self._processes = [self._start(kind) for kind in KINDS]
        os.environ[SHARED] = str(self._directory)

    def _start(self, kind: str) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            SHARED: str(self._directory),
            **ENVIRONMENT,
            **(COMPUTE_ENVIRONMENT if kind == "compute" else {}),
        }
        command = [sys.executable, "-m", "tests.zygotes", kind, str(self._directory / f"{kind}.sock")]
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, cwd=Path(__file__).parents[1])

    def close(self) -> None:
        os.environ.pop(SHARED, None)
        for process in self._processes:
            process.communicate()
        shutil.rmtree(self._directory, ignore_errors=True)


def environment_file(pid: int) -> Path:
    """Where the environment of a forked coordinator is told; what the system knows is that of an earlier process."""
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return Path(os.environ[SHARED], f"environment-{pid}-{started}")


def environment_of(pid: int) -> dict[str, str]:
    """As the process was started."""
    forked = environment_file(pid)
    if forked.exists():
        return dict(json.loads(forked.read_text()))
    text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="surrogateescape")
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def circumstances(pid: int, environment: Mapping[str, str]) -> tuple[object, ...]:
    """What a forked worker cannot change: it has to be the same for an engine and for its zygote."""
    own = {*ENVIRONMENT, *COMPUTE_ENVIRONMENT, *SET_LATE, *OF_NO_MATTER, "PYTHONPATH"}
    kept = {n: v for n, v in environment.items() if n not in own and not n.startswith("PYTEST_XDIST")}
    folders = {path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path} - {*sys.path}
    if FAULTS in environment:
        folders.discard(fault_folder(environment))
    return kept, folders, *(Path(f"/proc/{pid}/{file}").read_text() for file in ("cgroup", "limits"))


def fault_folder(environment: Mapping[str, str]) -> str:
    return environment["PYTHONPATH"].split(os.pathsep)[0]


def prepared(kind: str) -> ModuleType:
    """The worker's program, with what most tests need of classes and kernels; no thread is started for it."""
    program = imported(f"flexgen_lite.workers.{kind}.worker")
    if kind == "attention":
        importlib.import_module("flexgen_lite.workers.attention.warm_up").warm_up("float32", "float32")
    elif kind == "compute":
        program.prepare()
        torch = sys.modules["torch"]
        program.prefill_attention.prepare(torch.device("cpu"), torch.float32)
        for model_type in QUICKER:
            importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    assert len(os.listdir("/proc/self/task")) == 1
    return program


def serve(kind: str, path: str) -> None:
    """Until standard input ends."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    ours, program = circumstances(os.getpid(), os.environ), None
    while sys.stdin.fileno() not in (ready := select.select([sys.stdin.fileno(), listener], [], [])[0]):
        assert listener in ready
        connection, _ = listener.accept()
        with connection:
            (pid, *_) = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            try:
                environment = environment_of(pid)
                alike = circumstances(pid, environment) == ours
                working_directory, cpus = os.readlink(f"/proc/{pid}/cwd"), os.sched_getaffinity(pid)
            except OSError:  # it is gone
                continue
            if not alike:
                continue
            program = program or prepared(kind)
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                null = os.open(os.devnull, os.O_RDONLY)
                os.dup2(null, 0)
                os.close(null)
                os.chdir(working_directory)
                os.sched_setaffinity(0, cpus)
                zygote.adopt({name: value for name, value in environment.items() if name in {*SET_LATE, FAULTS}})
                sys.argv[1:] = zygote.serve(connection)
                name = sys.argv[sys.argv.index("--name") + 1]
                Path(path).with_name(f"{pid}-{os.getpid()}").write_text(name)
                if FAULTS in environment:
                    command = f"flexgen_lite.workers {kind} {' '.join(sys.argv)}"
                    fault_places.wrap_asked(command, Path(fault_folder(environment)))
                program.main()


if __name__ == "__main__":
    serve(*sys.argv[1:])

"""The coordinator's life as a child process, with a fake one."""

from __future__ import annotations

import gc
import json
import os
import queue
import select
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.errors import EngineError
from flexgen_lite.launcher import process
from flexgen_lite.launcher.process import EngineProcess
from flexgen_lite.llm import FlexGenLite
from flexgen_lite.memory.arena import Arena
from flexgen_lite.wire.engine_share import EngineShare, SharedWeights
from tests import fake_coordinator

pytestmark = pytest.mark.timeout(60)

SCRIPT = fake_coordinator.__file__
CONFIG = EngineConfig(model="m", ram="1GiB")


def command(mode: str) -> list[str]:
    return [sys.executable, SCRIPT, mode]


@pytest.fixture(autouse=True)
def runtime_base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tempfile.TemporaryDirectory(prefix="fgl-", dir="/tmp")  # short, as a socket's path has to be
    base = Path(folder.name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    paths = os.pathsep.join(path for path in sys.path if path)
    monkeypatch.setenv("PYTHONPATH", paths)
    yield base
    folder.cleanup()


def run_dir(base: Path) -> Path:
    (path,) = base.iterdir()
    return path


def test_start_and_stop(runtime_base: Path) -> None:
    logs: queue.Queue[str] = queue.Queue()
    with EngineProcess(CONFIG, command=command("ready"), on_log=logs.put) as engine:
        directory = run_dir(runtime_base)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert directory.name.startswith(f"flexgen-lite-{os.getpid()}-")
        order = json.loads((directory / "order.json").read_text())
        assert order["run_dir"] == str(directory)
        assert EngineConfig.from_json(json.dumps(order["config"])) == CONFIG
        assert engine.endpoint == f"ipc://{directory}/clients"
        assert engine.plan == "weights: 1.0 GiB\nkv: 2.0 GiB"
        assert logs.get(timeout=10) == f"hello from {engine.pid}"
        assert os.getsid(engine.pid) == engine.pid  # Ctrl-C does not reach it
        assert engine.last_words() is None
    engine.stop()
    assert list(runtime_base.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, 0)


def test_one_of_several_engines_inherits_the_arena(runtime_base: Path) -> None:
    arena = Arena("shared")
    share = EngineShare(1, 2, (0, 1), 1 << 30, arena.fd, SharedWeights((0, 3), 1 << 21, "abc"))
    with EngineProcess(CONFIG, command=command("ready"), share=share) as engine:
        order = json.loads((run_dir(runtime_base) / "order.json").read_text())
        assert EngineShare.from_dict(order["share"]) == share
        assert os.readlink(f"/proc/{engine.pid}/fd/{arena.fd}") == os.readlink(f"/proc/self/fd/{arena.fd}")
    arena.close()


@pytest.mark.parametrize(
    ("mode", "message", "user_error"),
    [
        ("user error", "^model has no config.json$", True),
        ("failure", "^the loader died$", False),
        ("dies at once", "with exit code 3", False),
        ("dies by signal", "killed by SIGKILL", False),
    ],
)
def test_a_failed_start(runtime_base: Path, mode: str, message: str, user_error: bool) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        EngineProcess(CONFIG, command=command(mode))
    assert caught.value.user_error == user_error
    assert caught.value.details == ("Traceback ..." if mode == "failure" else "")
    assert list(runtime_base.iterdir()) == []


def test_a_start_that_takes_too_long(runtime_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_START_GRACE", 0.0)
    config = EngineConfig(model="m", start_timeout=0.1)
    with pytest.raises(EngineError, match=r"not ready within 0\.1 s: raise start_timeout"):
        EngineProcess(config, command=command("never ready"))
    assert list(runtime_base.iterdir()) == []


def test_a_command_that_is_not_there(runtime_base: Path) -> None:
    with pytest.raises(EngineError, match="cannot be started"):
        EngineProcess(CONFIG, command=["/no/such/program"])
    assert list(runtime_base.iterdir()) == []


def test_death_is_told() -> None:
    with EngineProcess(CONFIG, command=command("ready")) as engine:
        os.kill(engine.pid, signal.SIGKILL)
        assert engine.last_words(20) == "the engine ended unexpectedly, killed by SIGKILL"


def test_output_is_drained(runtime_base: Path) -> None:
    seen: queue.Queue[str] = queue.Queue()
    with EngineProcess(CONFIG, command=command("talks a lot"), on_log=seen.put):
        while seen.get(timeout=20) != "line 19999":
            pass


def test_a_child_that_does_not_stop_is_killed(runtime_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_STOP_SECONDS", 0.1)
    logs: queue.Queue[str] = queue.Queue()
    engine = EngineProcess(CONFIG, command=command("ignores SIGTERM"), on_log=logs.put)
    while logs.get(timeout=10) != "ignoring":
        pass
    engine.stop()
    assert engine.last_words(10) == "the engine ended unexpectedly, killed by SIGKILL"
    assert list(runtime_base.iterdir()) == []


def test_it_ends_with_the_object(runtime_base: Path) -> None:
    engine = EngineProcess(CONFIG, command=command("ready"))
    pid = engine.pid
    del engine
    gc.collect()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert list(runtime_base.iterdir()) == []


def run_program(text: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)


PROGRAM = f"""
import sys
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.launcher.process import EngineProcess
engine = EngineProcess(EngineConfig(model="m"), command=[sys.executable, {SCRIPT!r}, "ready"])
print(engine.pid, flush=True)
"""


def test_it_ends_with_the_program(runtime_base: Path) -> None:
    program = run_program(PROGRAM)
    output, _ = program.communicate(timeout=30)
    assert program.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(output), 0)
    assert list(runtime_base.iterdir()) == []


def test_it_ends_when_the_program_is_killed(runtime_base: Path) -> None:
    program = run_program(PROGRAM + "__import__('time').sleep(600)\n")
    assert program.stdout is not None
    pid = int(program.stdout.readline())
    watched = os.pidfd_open(pid)
    program.kill()
    program.communicate(timeout=10)
    assert select.select([watched], [], [], 20)[0]
    os.close(watched)
    (left,) = runtime_base.iterdir()  # nobody was there to remove it
    with EngineProcess(CONFIG, command=command("ready")):
        assert left not in runtime_base.iterdir()


def test_what_others_own_is_left_alone(runtime_base: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    alive = runtime_base / f"flexgen-lite-{os.getpid()}-00000000"
    other = runtime_base / f"something-{dead.pid}-00000000"
    link = runtime_base / f"flexgen-lite-{dead.pid}-00000001"
    stale = runtime_base / f"flexgen-lite-{dead.pid}-00000002"
    for path in (alive, other, stale):
        path.mkdir()
    link.symlink_to(other)
    with EngineProcess(CONFIG, command=command("ready")):
        assert [path.is_dir() for path in (alive, other, link, stale)] == [True, True, True, False]


def test_a_long_temporary_path_is_avoided(runtime_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_base / ("x" * 100)))
    (runtime_base / ("x" * 100)).mkdir()
    with EngineProcess(CONFIG, command=command("ready")) as engine:
        assert len(engine.endpoint) < 108


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Callable[[], FlexGenLite]:
    monkeypatch.setattr(process, "COMMAND", command("serves"))
    return lambda: FlexGenLite("m", ram="1GiB")


def test_generate(serving: Callable[[], FlexGenLite]) -> None:
    with serving() as model:
        assert str(model.generate("hello")) == "HELLO"
        assert model.generate([1, 2, 3]).token_ids == [1, 2, 3]
        prompts = [f"p{number}" for number in range(500)]
        assert [str(completion) for completion in model.generate(prompts)] == [prompt.upper() for prompt in prompts]
        assert [str(completion) for completion in model.generate(["a", "b"], progress=True)] == ["A", "B"]
        assert model.generate([]) == []
        assert model.status().done == 504
        assert model.config.ram == 1 << 30
        assert "weights" in model.plan


def test_generate_without_with(runtime_base: Path, serving: Callable[[], FlexGenLite]) -> None:
    assert str(serving().generate("hello")) == "HELLO"
    gc.collect()
    assert list(runtime_base.iterdir()) == []


def test_a_killed_engine_is_started_again(runtime_base: Path, serving: Callable[[], FlexGenLite]) -> None:
    with serving() as model:

        def prompts() -> Iterator[str]:
            for number in range(300):
                if number == 150:
                    os.kill(model._engine.pid, signal.SIGKILL)
                yield f"p{number}"

        assert [str(completion) for completion in model.generate(prompts())] == [f"P{number}" for number in range(300)]
        assert model.engine_restarts == model.status().totals["engine_restarts"] == 1
        assert str(model.generate("more")) == "MORE"
    assert list(runtime_base.iterdir()) == []

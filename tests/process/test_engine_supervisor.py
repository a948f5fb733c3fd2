"""An engine that is started again, with a fake coordinator: how often, with what, and when not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexgen_lite import Client
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.errors import EngineError
from flexgen_lite.launcher import process, supervisor
from flexgen_lite.launcher.supervisor import EngineSupervisor
from tests import fake_coordinator
from tests.engine_processes import own_children

pytestmark = pytest.mark.timeout(60)
CONFIG = EngineConfig(model="m")


@pytest.fixture(autouse=True)
def runtime_base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing may be left in it."""
    monkeypatch.setattr(supervisor, "PAUSE_SECONDS", (0.01, 0.02))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    with tempfile.TemporaryDirectory(prefix="fgl-", dir="/tmp") as folder:
        base = Path(folder) / "r"
        base.mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
        monkeypatch.setenv("FAKE_COORDINATOR_STARTS", f"{folder}/starts")
        yield base
        assert list(base.iterdir()) == []


@pytest.fixture
def logs() -> list[str]:
    return []


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, logs: list[str]) -> Callable[..., EngineSupervisor]:
    """A supervisor of engines of these modes."""

    def start(*modes: str, config: EngineConfig = CONFIG) -> EngineSupervisor:
        monkeypatch.setattr(process, "COMMAND", [sys.executable, fake_coordinator.__file__, ",".join(modes)])
        return EngineSupervisor(config, on_log=logs.append)

    return start


def num_starts(logs: list[str]) -> int:
    return sum(line.startswith("hello from") for line in logs)


def warnings(logs: list[str]) -> list[str]:
    return [line for line in logs if line.startswith("warning: ")]


def answers(client: Client, count: int) -> list[str]:
    return [str(completion) for completion in client.submit(f"p{number}" for number in range(count)).results()]


def expected(count: int) -> list[str]:
    return [f"P{number}" for number in range(count)]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def test_one_restart_for_all_clients(start: Callable[..., EngineSupervisor], logs: list[str]) -> None:
    with start("serves") as engine:
        clients = [engine.connect() for _ in range(4)]
        for number in (1, 2):
            os.kill(engine.pid, signal.SIGKILL)
            for client in clients:
                assert answers(client, 20) == expected(20)
            assert engine.restarts == number and num_starts(logs) == number + 1
            assert engine.connect().status().totals["engine_restarts"] == 0, "of those that it has seen itself"
            assert [client.status().totals["engine_restarts"] for client in clients] == [number] * 4
    beginnings = [line[:76] for line in warnings(logs)]
    assert beginnings == ["warning: the engine ended unexpectedly, killed by SIGKILL; starting it again"] * 2


def test_any_number_of_deaths_as_long_as_something_gets_done(
    start: Callable[..., EngineSupervisor], logs: list[str]
) -> None:
    with start("dies on the way") as engine, engine.connect() as client:
        assert answers(client, 1500) == expected(1500)
        assert engine.restarts > supervisor.MOST_LOSSES + 2
    assert all("open requests are submitted again" in line for line in warnings(logs))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("dies when asked", "the engine ended unexpectedly, killed by SIGKILL"),
        ("fails when asked", "the loader died"),
    ],
)
def test_deaths_that_lead_nowhere(
    start: Callable[..., EngineSupervisor], logs: list[str], mode: str, message: str
) -> None:
    with start(mode) as engine, engine.connect() as client:
        with pytest.raises(EngineError, match=f"^{message}$") as caught:
            answers(client, 5)
        assert not caught.value.user_error
        for call in (client.status, engine.connect, lambda: client.submit("x")):
            with pytest.raises(EngineError, match=f"^{message}$"):
                call()  # type: ignore[operator]
    assert num_starts(logs) == supervisor.MOST_LOSSES
    assert "3 times in a row with no request finished: it is not started again" in warnings(logs)[-1]


@pytest.mark.parametrize(
    ("mode", "message"),
    [("user error when asked", "the model changed"), ("fails for good when asked", "a file changed")],
)
def test_an_error_that_would_come_again(
    start: Callable[..., EngineSupervisor], logs: list[str], mode: str, message: str
) -> None:
    with start(mode) as engine, engine.connect() as client, pytest.raises(EngineError, match=f"^{message}$"):
        answers(client, 5)
    assert num_starts(logs) == 1


def test_a_restart_that_the_user_has_to_put_right(start: Callable[..., EngineSupervisor], logs: list[str]) -> None:
    with start("dies when asked", "user error") as engine, engine.connect() as client:
        with pytest.raises(EngineError, match=r"^model has no config\.json$") as caught:
            answers(client, 5)
        assert caught.value.user_error
    assert num_starts(logs) == 2


def test_a_first_start_that_fails_is_not_tried_again(start: Callable[..., EngineSupervisor]) -> None:
    with pytest.raises(EngineError, match="killed by SIGKILL"):
        start("dies by signal", "serves")


@pytest.mark.parametrize("mode", ["dies at once", "dies by signal", "failure"])
def test_a_restart_that_dies_is_tried_again(start: Callable[..., EngineSupervisor], logs: list[str], mode: str) -> None:
    with start("dies when asked", mode, "serves") as engine, engine.connect() as client:
        assert answers(client, 5) == expected(5)
        assert engine.restarts == client.status().totals["engine_restarts"] == len(warnings(logs)) == 2


def test_another_model_is_no_substitute(start: Callable[..., EngineSupervisor], logs: list[str]) -> None:
    """Its fingerprint may be the same: files of the same size that were written anew."""
    with start("dies when asked", "serves another model") as engine, engine.connect() as client:
        with pytest.raises(EngineError, match="m changed while it was in use: start anew") as caught:
            answers(client, 5)
        assert caught.value.user_error
    assert num_starts(logs) == 2


def test_an_engine_that_hangs_is_killed(
    start: Callable[..., EngineSupervisor], logs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = partial(Client, heartbeat=0.1, answer_timeout=0.5)
    monkeypatch.setattr(supervisor, "Client", impatient)
    with start("hangs when asked", "serves") as engine, engine.connect() as client:
        assert answers(client, 5) == expected(5)
    assert "has not answered for" in warnings(logs)[0]


def configs(logs: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("config: ")) for line in logs if line.startswith("config: ")]


def test_what_was_automatic_stays_as_it_came_out(start: Callable[..., EngineSupervisor], logs: list[str]) -> None:
    """Whatever fills the memory now; what was said is left as it is."""
    for given in (CONFIG, EngineConfig(model="m", ram="1GiB", dtype="float32", device="cuda:1")):
        with start("dies when asked", "serves", config=given) as engine, engine.connect() as client:
            assert answers(client, 5) == expected(5)
        before, after = configs(logs)
        assert before == json.loads(given.to_json())
        said = given is not CONFIG
        decided = {"ram": 1 << 30, "dtype": "float32", "device": "cuda:1"} if said else fake_coordinator.DECIDED
        assert after == {**before, **{key: decided[key] for key in ("ram", "dtype", "device")}}
        Path(os.environ["FAKE_COORDINATOR_STARTS"]).unlink()
        logs.clear()


def test_a_trace_is_not_overwritten(start: Callable[..., EngineSupervisor], logs: list[str], tmp_path: Path) -> None:
    (tmp_path / "trace-2.json").write_text("mine")
    with start("dies on the way", config=EngineConfig(model="m", trace=tmp_path / "trace.json")) as engine:
        for name in ("trace-3.json", "trace-4.json"):
            answers(engine.connect(), 300)
            assert configs(logs)[-1]["trace"] == str(tmp_path / name)
            (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe")
    assert supervisor._next_trace(tmp_path / "pipe") == tmp_path / "pipe"


def refused(engine: EngineSupervisor) -> None:
    with pytest.raises(EngineError, match="the engine was stopped"):
        engine.connect()


@pytest.mark.parametrize("moment", ["before the pause is over", "while it starts"])
def test_stopped_while_it_is_started_again(
    start: Callable[..., EngineSupervisor], logs: list[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    if moment == "before the pause is over":
        monkeypatch.setattr(supervisor, "PAUSE_SECONDS", (600.0,))
    with start("dies when asked", "never ready") as engine:
        client = engine.connect()
        job = client.submit("x")
        wait_until(lambda: len(warnings(logs)) == 1 and (moment != "while it starts" or num_starts(logs) == 2))
        waiting = threading.Thread(target=refused, args=(engine,))
        waiting.start()
    with pytest.raises(EngineError, match="the engine was stopped"):
        job.results()
    waiting.join(10)
    assert not waiting.is_alive() and not own_children()


def test_clients_that_come_meanwhile_wait(start: Callable[..., EngineSupervisor], logs: list[str]) -> None:
    with start("dies when asked", "serves") as engine:
        first = engine.connect()
        job = first.submit("x")
        wait_until(lambda: bool(warnings(logs)))
        assert answers(engine.connect(), 3) == expected(3)
        assert [str(completion) for completion in job] == ["X"]


PROGRAM = f"""
import sys, time
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.launcher import process, supervisor
process.COMMAND = [sys.executable, {fake_coordinator.__file__!r}, sys.argv[1]]
engine = supervisor.EngineSupervisor(EngineConfig(model="m"), on_log=lambda text: print(text, flush=True))
client = engine.connect()
"""


@pytest.mark.parametrize(
    "end",
    [
        "client.submit(['x'] * 500).results()",  # a new engine is there
        "client.submit('x'); time.sleep(0.3)",  # it is about to be
        "",
    ],
)
def test_the_end_of_the_program_is_the_end(end: str) -> None:
    """Also where nobody has stopped anything."""
    mode = "dies when asked" if "sleep" in end else "dies on the way"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM + end, mode], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "was stopped" not in done.stdout, "no start is begun at the end"
    pids = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("hello from")]
    assert pids and not any(psutil.pid_exists(pid) for pid in pids)


def test_a_fork_does_nothing_to_it(start: Callable[..., EngineSupervisor]) -> None:
    with start("serves") as engine, engine.connect() as client:
        child = os.fork()
        if child == 0:
            engine.stop()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert answers(client, 3) == expected(3)
        assert engine.restarts == 0


ORPHANS = """
import json, subprocess, sys, time
sys.stdin.readline()
worker = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
print(json.dumps({"event": "log", "message": str(worker.pid)}))
print(json.dumps({"event": "ready", "endpoint": "ipc:///nowhere"}), flush=True)
time.sleep(600)
"""


def test_workers_of_a_dead_coordinator_are_gone_before_the_next_one_starts() -> None:
    found: list[str] = []
    engine = process.EngineProcess(CONFIG, command=[sys.executable, "-c", ORPHANS], on_log=found.append)
    wait_until(lambda: bool(found))
    worker = psutil.Process(int(found[0]))
    os.kill(engine.pid, signal.SIGKILL)
    failure = engine.end(10)
    assert str(failure) == "the engine ended unexpectedly, killed by SIGKILL"
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE

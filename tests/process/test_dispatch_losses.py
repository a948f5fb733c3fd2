"""The queue in front of engines that die, hang and fail, with fake ones: what becomes of requests, and when it ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import zmq

from flexgen_lite import Client
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.dispatch.dispatcher import Dispatcher
from flexgen_lite.dispatch.engine_link import EngineLink
from flexgen_lite.engine.event_loop import EventLoop
from flexgen_lite.errors import EngineError
from flexgen_lite.launcher.process import EngineProcess
from flexgen_lite.launcher.supervisor import MOST_LOSSES
from tests import fake_coordinator
from tests.engine_processes import survivors
from tests.fake_owner import FakeOwner

pytestmark = pytest.mark.timeout(60)
CONFIG = EngineConfig(model="m", engines=2, ram="4GiB")
PROGRAM = f"""
import sys
from flexgen_lite.dispatch import __main__ as program, engine_link
from flexgen_lite.launcher import process, supervisor
process.COMMAND = [sys.executable, {fake_coordinator.__file__!r}, sys.argv[1]]
supervisor.PAUSE_SECONDS = (0.01, 0.02)
engine_link.ANSWER_SECONDS = 0.5
raise SystemExit(program.main())
"""
Start = Callable[..., EngineProcess]


@pytest.fixture
def logs() -> list[str]:
    return []


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, logs: list[str]) -> Iterator[Start]:
    """Engines of these modes, by the order in which they are started."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    started: list[EngineProcess] = []
    with tempfile.TemporaryDirectory(prefix="fgl-", dir="/tmp") as folder:
        (Path(folder) / "r").mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", f"{folder}/r")
        monkeypatch.setenv("FAKE_COORDINATOR_STARTS", f"{folder}/starts")

        def start(modes: str, config: EngineConfig = CONFIG) -> EngineProcess:
            engine = EngineProcess(config, command=[sys.executable, "-c", PROGRAM, modes], on_log=logs.append)
            started.append(engine)
            return engine

        yield start
        for engine in started:
            engine.stop()
        assert [*(Path(folder) / "r").iterdir()] == []


def answers(client: Client, count: int) -> list[str]:
    return [str(completion) for completion in client.submit(f"p{number}" for number in range(count)).results()]


def expected(count: int) -> list[str]:
    return [f"P{number}" for number in range(count)]


def warnings(logs: list[str]) -> list[str]:
    return [line for line in logs if line.startswith("warning: ")]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def num_starts(logs: list[str]) -> int:
    return sum(": hello from " in line for line in logs)


def test_all_of_them_serve(start: Start, logs: list[str]) -> None:
    with start("serves") as engine, Client(engine.endpoint) as client:
        assert client.welcome.window == 2 * 4096 and client.welcome.max_length == 100
        assert answers(client, 3000) == expected(3000)
        status = client.status()
        assert (status.done, status.waiting, status.totals["engine_restarts"]) == (3000, 0, 0)
        assert engine.plan.count("kv: 2.0 GiB") == 1 and "engine 0, 1" in engine.plan
        assert engine.decided["ram"] == 4 << 30 and engine.decided["engines"] == 2
    assert num_starts(logs) == 2 and logs[0].startswith("engine 0: hello from")


def test_what_engines_are_told(start: Start, logs: list[str], tmp_path: Path) -> None:
    own = {"endpoint": f"ipc://{tmp_path}/socket", "trace": tmp_path / "t.json", "kv_disk": "3GiB"}
    with start("serves", EngineConfig(model="m", engines=2, ram="4GiB", kv_disk_dir=tmp_path, **own)) as engine:
        assert engine.endpoint == own["endpoint"]
        orders = [json.loads(path.read_text()) for path in Path(os.environ["XDG_RUNTIME_DIR"]).rglob("order.json")]
    orders.sort(key=lambda order: order["share"]["number"])
    for number, (order, dtype) in enumerate(zip(orders, ("auto", "bfloat16"), strict=True)):
        config, share = order["config"], order["share"]
        assert (config["engines"], config["endpoint"], config["device"], config["dtype"]) == (1, None, "cpu", dtype)
        assert config["trace"] == str(tmp_path / f"t-engine{number}.json")
        assert (config["kv_disk"], config["kv_disk_dir"]) == (3 << 29, str(tmp_path / f"engine-{number}"))
        assert share["ram"] == (4 << 30) - (128 << 20) and share["count"] == 2
    assert not {*orders[0]["share"]["cpus"]} & {*orders[1]["share"]["cpus"]}


def test_engines_that_die_on_the_way(start: Start, logs: list[str]) -> None:
    with start("serves,dies on the way") as engine, Client(engine.endpoint) as client:
        for _ in range(3):
            assert answers(client, 2000) == expected(2000)
        restarts = client.status().totals["engine_restarts"]
    assert restarts >= 1
    told = warnings(logs)
    assert all(line.startswith("warning: engine 1: the engine ended unexpectedly, killed by SIGKILL") for line in told)
    assert "open requests are submitted again" in told[0]


@pytest.mark.parametrize("mode", ["hangs when asked", "fails when asked", "dies when asked"])
def test_one_that_is_lost_comes_back(start: Start, logs: list[str], mode: str) -> None:
    with start(f"serves,{mode},serves") as engine, Client(engine.endpoint) as client:
        assert answers(client, 100) == expected(100)
        while client.status().totals["engine_restarts"] == 0 or num_starts(logs) < 3:
            assert answers(client, 100) == expected(100)
    why = {"hangs": "has not answered for", "fails": "the loader died", "dies": "killed by SIGKILL"}[mode.split()[0]]
    assert why in warnings(logs)[0] and len(warnings(logs)) == 1


def test_one_that_cannot_come_back_is_done_without(start: Start, logs: list[str]) -> None:
    with start("serves,dies when asked,user error") as engine, Client(engine.endpoint) as client:
        while not any("is given up" in line for line in logs):
            assert answers(client, 100) == expected(100)
        assert answers(client, 100) == expected(100)
        assert client.status().totals["engine_restarts"] == num_starts(logs) - 2 >= 1
        assert engine.outage is None
    assert warnings(logs)[-1] == ("warning: engine 1 is given up: model has no config.json; the others go on")


def test_none_is_open(start: Start, logs: list[str]) -> None:
    """Of engines that are started again and do not come."""
    with start("serves,serves,never ready") as engine, Client(engine.endpoint) as client:
        for number, child in enumerate(psutil.Process(engine.pid).children()):
            assert engine.outage is None
            child.kill()
            wait_until(lambda starts=3 + number: num_starts(logs) == starts)  # type: ignore[misc]
            assert client.status().totals["engine_restarts"] == 1 + number, "before they are there"
        wait_until(lambda: engine.restarts == 2)
        assert engine.outage is not None and "no other engine is open, and one is being started again" in engine.outage


def test_given_up_at_the_same_moment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dispatcher, owners = Dispatcher(CONFIG, tmp_path, None), [FakeOwner(tmp_path), FakeOwner(tmp_path)]
    with zmq.Context() as context:
        for number, owner in enumerate(owners):
            link = EngineLink(number, dispatcher, EventLoop(), context, lambda: 0)
            dispatcher._links.append(link)
            link.follow(owner)
        for owner in owners:
            owner.give_up(EngineError("the model is gone"))
        with pytest.raises(EngineError, match="the model is gone") as caught:
            dispatcher._step()
    dispatcher.__exit__(None, None, None)
    told = [json.loads(line)["message"] for line in capsys.readouterr().out.splitlines()]
    assert told == ["warning: engine 0 is given up: the model is gone"], "and no others go on"
    assert caught.value.comes_again


def test_when_all_are_given_up_it_ends(start: Start, logs: list[str]) -> None:
    engine = start("dies when asked")
    with Client(engine.endpoint, epitaph=engine.last_words) as client:
        job = client.submit([f"p{number}" for number in range(20)])
        with pytest.raises(EngineError, match="killed by SIGKILL"):
            job.results()
    assert num_starts(logs) == 2 * MOST_LOSSES
    failure = engine.end(10)
    assert failure is not None and failure.comes_again, "whoever started it need not try again"


def test_a_request_that_ends_engines(start: Start, logs: list[str]) -> None:
    """The fake engines die of the first request, and serve from the fourth start on."""
    with start(",".join([*["dies when asked"] * 4, "serves"])) as engine, Client(engine.endpoint) as client:
        found = client.submit(["x"]).results()
        assert found[0].error is not None and found[0].error.startswith(
            "3 engines were lost while they had this request, which may be why; the last: "
        )
        assert engine.last_words() is None, "and the engines go on"
        assert client.status().totals["requests_failed"] == 1


@pytest.mark.parametrize(
    ("modes", "message"),
    [("user error", "engine 0: model has no config.json"), ("serves,user error", "engine 1: model has no config.json")],
)
def test_a_first_start_that_fails(start: Start, modes: str, message: str) -> None:
    with pytest.raises(EngineError, match=f"^{message}$") as caught:
        start(modes)
    assert caught.value.user_error


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("hangs", [False, True])
def test_nothing_is_left_behind(start: Start, number: signal.Signals, hangs: bool) -> None:
    engine = start("serves")
    children = psutil.Process(engine.pid).children(recursive=True)
    assert len(children) == 2
    if hangs and number == signal.SIGKILL:
        for child in children:
            child.suspend()
    os.kill(engine.pid, number)
    engine.end(10)
    assert not survivors(children, 5)

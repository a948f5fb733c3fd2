"""The client against a fake engine: order, windows, failures; nothing may hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite import Client, EngineError, SamplingParams
from flexgen_lite.client.sampling_params import GREEDY
from flexgen_lite.wire.client_messages import Cancel, Connect, EngineFailed, GetStatus, RequestDone, Submit
from tests.fake_engine import FakeEngine, answer

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def socket_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "e"


def test_results_come_in_input_order(socket_path: Path) -> None:
    with FakeEngine(socket_path, hold=True) as engine, Client(engine.endpoint) as client:
        job = client.submit(["a", "b", [1, 2, 3]])
        submit = engine.next_of(Submit)
        engine.release()
        results = job.results()
    assert [completion.index for completion in results] == [0, 1, 2]
    assert [str(completion) for completion in results] == ["A", "B", ""]
    assert (results[2].token_ids, results[2].prompt) == ([1, 2, 3], [1, 2, 3])
    assert submit.requests[0].params == GREEDY.to_wire()
    assert (len(job), job.done, job.failed) == (3, 3, 0)


def test_iteration_is_in_completion_order(socket_path: Path) -> None:
    with FakeEngine(socket_path, hold=True) as engine, Client(engine.endpoint) as client:
        job = client.submit(["a", "b", "c"])
        received = 0
        while received < 3:
            received += len(engine.next_of(Submit).requests)
        engine.release()
        assert [completion.index for completion in job] == [2, 1, 0]


def test_single_prompt_and_no_prompt(socket_path: Path) -> None:
    with FakeEngine(socket_path) as engine, Client(engine.endpoint) as client:
        assert [c.text for c in client.submit("one")] == ["ONE"]
        assert [c.token_ids for c in client.submit([7, 8])] == [[7, 8]]
        assert client.submit([]).results() == []


def test_params_one_for_each(socket_path: Path) -> None:
    params = [SamplingParams(max_tokens=n) for n in (1, 2)]
    with FakeEngine(socket_path, window=8) as engine, Client(engine.endpoint) as client:
        client.submit(["a", "b"], params).results()
        sent = [r.params.max_tokens for r in engine.next_of(Submit).requests]
        while len(sent) < 2:
            sent += [r.params.max_tokens for r in engine.next_of(Submit).requests]
        assert sent == [1, 2]
        with pytest.raises(ValueError, match="2 params for 3 prompts"):
            client.submit(["a", "b", "c"], params)
        with pytest.raises(ValueError, match="shorter"):
            client.submit((p for p in "abc"), params).results()


def test_endless_generator_is_read_no_further_than_the_window(socket_path: Path) -> None:
    pulled = 0

    def prompts() -> Iterator[str]:
        nonlocal pulled
        while True:
            pulled += 1
            yield f"p{pulled}"

    with FakeEngine(socket_path, window=8) as engine, Client(engine.endpoint) as client:
        job = client.submit(prompts())
        for taken in range(1, 101):
            next(job)
            assert pulled <= taken + 8
        assert engine.most_outstanding <= 8
        job.cancel()
        assert job.results() is not None


def test_the_window_is_shared_but_an_unread_job_does_not_block_another(socket_path: Path) -> None:
    with FakeEngine(socket_path, window=4) as engine, Client(engine.endpoint) as client:
        unread = client.submit([f"u{i}" for i in range(50)])
        assert len(client.submit([f"r{i}" for i in range(50)]).results()) == 50
        assert len(unread.results()) == 50
        assert engine.most_outstanding <= 4


def test_many_requests_from_many_threads(socket_path: Path) -> None:
    outcomes: dict[int, list[str]] = {}
    with FakeEngine(socket_path, window=300) as engine, Client(engine.endpoint) as client:

        def work(number: int) -> None:
            outcomes[number] = [str(c) for c in client.submit(f"t{number} {i}" for i in range(500)).results()]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert engine.most_outstanding <= 300
    assert outcomes == {n: [f"T{n} {i}" for i in range(500)] for n in range(6)}


def test_parts_have_at_most_256_requests(socket_path: Path) -> None:
    with FakeEngine(socket_path, window=5000) as engine, Client(engine.endpoint) as client:
        assert len(client.submit(["x"] * 3000).results()) == 3000
        sizes: list[int] = []
        while sum(sizes) < 3000:
            sizes.append(len(engine.next_of(Submit).requests))
        assert max(sizes) <= 256


def test_cancel_ends_the_job_and_frees_the_window(socket_path: Path) -> None:
    with FakeEngine(socket_path, window=4, hold=True) as engine, Client(engine.endpoint) as client:
        job = client.submit(f"{i}" for i in range(1000))
        engine.next_of(Submit)
        job.cancel()
        results = job.results()
        assert {completion.finish_reason for completion in results} <= {"cancelled"}
        assert len(results) <= 4
        engine.next_of(Cancel)
        engine.release()
        assert len(client.submit(["x"] * 9).results()) == 9


class SlowEngine(FakeEngine):
    """Takes half a second for each of a client's messages, as on a machine that has other things to do."""

    def _handle(self, client: bytes, message: Any) -> None:
        if not isinstance(message, Connect | GetStatus):
            time.sleep(0.5)
        super()._handle(client, message)


def heard(engine: FakeEngine) -> list[Any]:
    return [message for message in list(engine.received.queue) if isinstance(message, Cancel | Submit)]


def test_a_cancel_that_has_returned_holds(socket_path: Path) -> None:
    with SlowEngine(socket_path, hold=True) as engine, Client(engine.endpoint) as client:
        job = client.submit(["a"], keep=True, job_id="kept")
        engine.next_of(Submit)
        job.cancel()
        assert heard(engine) == [Cancel("kept")]
        job.cancel()
        assert heard(engine) == [Cancel("kept")] * 2, "also when all is done"


def test_what_a_client_was_told_the_engine_hears_though_it_is_closed_at_once(socket_path: Path) -> None:
    with SlowEngine(socket_path, hold=True) as engine:
        client = Client(engine.endpoint)
        client.submit(["a"] * 3, job_id="cancelled", keep=True).cancel(wait=False)
        client.submit(["b"] * 3, job_id="left")
        client.close()
        assert {Cancel("cancelled"), Cancel("left")} <= set(heard(engine))


def test_a_job_to_be_kept_is_with_the_engine_when_its_client_is_closed_at_once(socket_path: Path) -> None:
    with SlowEngine(socket_path, hold=True, window=2000) as engine:
        with Client(engine.endpoint) as client:
            client.submit([f"{i}" for i in range(600)], job_id="kept", keep=True)
        found = heard(engine)
    assert [request.prompt for message in found for request in message.requests] == [f"{i}" for i in range(600)]


def test_nobody_waits_for_an_engine_that_is_gone(socket_path: Path) -> None:
    with FakeEngine(socket_path, silent=True) as engine, Client(engine.endpoint) as client:
        job = client.submit(["a"], keep=True, job_id="kept")
        engine.next_of(Submit)
        threading.Timer(0.5, engine.die).start()
        job.cancel()  # returns


def test_closing_takes_seconds_where_the_engine_does_not_answer(socket_path: Path) -> None:
    with FakeEngine(socket_path, silent=True) as engine:
        client = Client(engine.endpoint)
        client.submit(iter(["a"]), keep=True, job_id="kept")
        begun = time.monotonic()
        client.close()
        assert time.monotonic() - begun < 20


def test_a_failed_request_has_an_error_and_the_others_go_on(socket_path: Path) -> None:
    def refuse_long(submit: Submit) -> list[object]:
        return [answer(submit.job_id, r, "too long" if len(r.prompt) > 3 else None) for r in submit.requests]

    with FakeEngine(socket_path, on_submit=refuse_long) as engine, Client(engine.endpoint) as client:
        job = client.submit(["ab", "abcdef", "c"])
        results = job.results()
        assert [(c.text, c.error, c.finish_reason == "error") for c in results] == [
            ("AB", None, False),
            ("", "too long", True),
            ("C", None, False),
        ]
        assert (job.done, job.failed) == (3, 1)


@pytest.mark.parametrize("bad", [3.5, "\ud800", [1, "x"], [1, 1 << 40]])
def test_a_prompt_that_is_none_ends_its_job_alone(socket_path: Path, bad: object) -> None:
    with FakeEngine(socket_path, window=2) as engine, Client(engine.endpoint) as client:
        with pytest.raises((TypeError, ValueError), match="prompt 5"):
            client.submit(["a"] * 5 + [bad] + ["b"] * 50).results()  # type: ignore[arg-type]
        assert len(client.submit(["x"] * 9).results()) == 9


def test_an_error_in_the_source_reaches_the_reader(socket_path: Path) -> None:
    def prompts() -> Iterator[str]:
        yield "a"
        raise OSError("the disk is gone")

    with (
        FakeEngine(socket_path, hold=True) as engine,
        Client(engine.endpoint) as client,
        pytest.raises(OSError, match="the disk is gone"),
    ):
        client.submit(prompts()).results()


def test_the_engines_last_words_reach_every_waiter(socket_path: Path) -> None:
    errors: list[str] = []
    with FakeEngine(socket_path, silent=True) as engine, Client(engine.endpoint) as client:

        def wait_for(call: object) -> None:
            with pytest.raises(EngineError) as caught:
                call()  # type: ignore[operator]
            errors.append(str(caught.value))

        jobs = [client.submit(["a", "b"]) for _ in range(3)]
        threads = [threading.Thread(target=wait_for, args=(job.results,)) for job in jobs]
        threads.append(threading.Thread(target=wait_for, args=(client.status,)))
        for thread in threads:
            thread.start()
        engine.next_of(GetStatus)
        engine.broadcast(EngineFailed("attention worker 1 died: out of memory"))
        for thread in threads:
            thread.join(20)
        with pytest.raises(EngineError, match="attention worker 1"):
            client.submit("more")
        with pytest.raises(EngineError, match="attention worker 1"):
            client.status()
    assert errors == ["attention worker 1 died: out of memory"] * 4


def test_sudden_death_is_noticed(socket_path: Path) -> None:
    with FakeEngine(socket_path, silent=True) as engine, Client(engine.endpoint) as client:
        job = client.submit("a")
        engine.next_of(Submit)
        engine.die()
        with pytest.raises(EngineError, match="closed the connection"):
            job.results()


def test_sudden_death_with_an_epitaph(socket_path: Path) -> None:
    dead = threading.Event()

    def epitaph(patience: float) -> str | None:
        return "killed by signal 9" if dead.is_set() else None

    with FakeEngine(socket_path, silent=True) as engine, Client(engine.endpoint, epitaph=epitaph) as client:
        job = client.submit("a")
        engine.next_of(Submit)
        dead.set()
        with pytest.raises(EngineError, match="killed by signal 9"):
            job.results()


def test_an_engine_that_hangs_is_given_up(socket_path: Path) -> None:
    with (
        FakeEngine(socket_path, silent=True) as engine,
        Client(engine.endpoint, heartbeat=0.05, answer_timeout=0.1) as client,
        pytest.raises(EngineError, match="has not answered"),
    ):
        client.submit("a").results()


def test_heartbeats_keep_an_idle_client(socket_path: Path) -> None:
    with FakeEngine(socket_path) as engine, Client(engine.endpoint, heartbeat=0.01) as client:
        for _ in range(3):
            engine.next_of(GetStatus)
        assert client.status().lanes == {"compute": 0.9, "disk": 0.2}


@pytest.mark.parametrize("garbage", [b"", b"\xff\x00", b"\x92\xa5Hello\x90", b"\x92\xa7Welcome\x91\x01"])
def test_garbage_is_refused(socket_path: Path, garbage: bytes) -> None:
    with FakeEngine(socket_path, silent=True) as engine, Client(engine.endpoint) as client:
        job = client.submit("a")
        engine.next_of(Submit)
        engine.broadcast(garbage)
        with pytest.raises(EngineError, match="does not speak this protocol"):
            job.results()


def test_answers_nobody_waits_for_are_ignored(socket_path: Path) -> None:
    def answer_twice(submit: Submit) -> list[RequestDone]:
        strangers = [answer("no such job", r) for r in submit.requests]
        return strangers + [answer(submit.job_id, r) for r in submit.requests for _ in range(2)]

    with (
        FakeEngine(socket_path, window=3, on_submit=answer_twice) as engine,
        Client(engine.endpoint) as client,
    ):
        assert len(client.submit(["a"] * 20).results()) == 20


def test_no_engine_there(socket_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no engine at ipc://.*there is no such socket"):
        Client(f"ipc://{socket_path}")
    with pytest.raises(EngineError, match="not supported"):
        Client("udp://127.0.0.1:1")


def test_nobody_answers(socket_path: Path) -> None:
    socket_path.touch()
    with pytest.raises(EngineError, match=f"ipc://{socket_path} did not answer within 0.1 s"):
        Client(f"ipc://{socket_path}", connect_timeout=0.1)


def test_another_protocol(socket_path: Path) -> None:
    with (
        FakeEngine(socket_path, protocol=99) as engine,
        pytest.raises(EngineError, match="speaks protocol 99"),
    ):
        Client(engine.endpoint)


def test_close_ends_waiting_readers_and_tells_the_engine(socket_path: Path) -> None:
    with FakeEngine(socket_path, hold=True) as engine:
        client = Client(engine.endpoint)
        job = client.submit(["a"])
        submit = engine.next_of(Submit)
        client.close()
        client.close()
        with pytest.raises(EngineError, match="closed"):
            job.results()
        with pytest.raises(EngineError, match="closed"):
            client.submit("b")
        assert engine.next_of(Cancel) == Cancel(submit.job_id)

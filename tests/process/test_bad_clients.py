"""Clients that vanish, send garbage, flood, or do not read: nobody else is hurt, and kept jobs are not done twice."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from flexgen_lite import Client, EngineError, FlexGenLite, SamplingParams
from flexgen_lite.engine.frontend import MAX_MESSAGE_BYTES
from flexgen_lite.queue.client_jobs import MAX_OPEN
from flexgen_lite.wire.client_messages import (
    Cancel,
    Connect,
    EngineFailed,
    GetStatus,
    RequestDone,
    Submit,
    ToClient,
    ToEngine,
    WireRequest,
)
from flexgen_lite.wire.codec import Codec
from tests.tiny_models import make_model, ragged_prompts

PROMPTS = ragged_prompts(60, longest=20)
SEEDED: dict[str, Any] = {"temperature": 0.8, "seed": 1, "ignore_eos": True}
LONG = SamplingParams(max_tokens=110, **SEEDED)
PARAMS = SamplingParams(max_tokens=40, **SEEDED)
ENCODE, DECODE = Codec(ToEngine).encode, Codec(ToClient).decode


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlexGenLite]:
    with FlexGenLite(make_model("opt", tmp_path_factory.mktemp("opt"), num_hidden_layers=1), dtype="float32") as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(engine: FlexGenLite) -> list[list[int]]:
    return tokens(engine)


@pytest.fixture
def raw(engine: FlexGenLite) -> Iterator[zmq.Socket[bytes]]:
    """A socket to the engine that does as it likes."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.sndtimeo = dealer.rcvtimeo = 20_000
        dealer.connect(engine.endpoint)
        yield dealer


def tokens(engine: FlexGenLite) -> list[list[int]]:
    return [list(completion.token_ids) for completion in engine.generate(PROMPTS, PARAMS)]


def generated(engine: FlexGenLite) -> float:
    return engine.status().totals["generated_tokens"]


def coordinator_bytes(engine: FlexGenLite) -> int:
    return int(psutil.Process(engine._engine.pid).memory_info().rss)


VANISHING = f"""
import os, sys
from flexgen_lite import Client, SamplingParams
client = Client(sys.argv[1])
params = SamplingParams(max_tokens=40, **{SEEDED})
job = client.submit({PROMPTS}, params, job_id=sys.argv[2], keep=sys.argv[3] == "keep")
next(iter(job))
os._exit(9)
"""


STREAMING = f"""
import sys
from flexgen_lite import Client, SamplingParams
from flexgen_lite.client.request import Request
client = Client(sys.argv[1], heartbeat=1)
long = SamplingParams(max_tokens=110, **{SEEDED})
job = client.submit_requests((Request([5, 6, 7], long, stream=True) for _ in range(200)), 200)
print(sum(len(completion.token_ids) for completion in job), flush=True)
"""


def vanish(engine: FlexGenLite, job_id: str, how: str) -> None:
    command = [sys.executable, "-c", VANISHING, engine.endpoint, job_id, how]
    assert subprocess.run(command, cwd=Path(__file__).parents[2], timeout=60).returncode == 9


def wait_idle(engine: FlexGenLite) -> None:
    while (status := engine.status()).running or status.waiting:
        time.sleep(0.05)


def test_a_kept_job_outlives_its_client_and_is_not_done_twice(engine: FlexGenLite, expected: list[list[int]]) -> None:
    before = generated(engine)
    vanish(engine, "kept", "keep")
    wait_idle(engine)
    for _ in range(2):  # as often as it is asked for
        with Client(engine.endpoint) as client:
            job = client.submit(PROMPTS, PARAMS, job_id="kept", keep=True)
            assert [list(c.token_ids) for c in job.results()] == expected
    assert generated(engine) - before == sum(map(len, expected)), "every request once"
    with Client(engine.endpoint) as client:
        others = client.submit([[5, 6]], PARAMS, job_id="kept", keep=True).results()
        assert "was another one: give the job another id" in (others[0].error or "")
        job = client.submit(PROMPTS, PARAMS, job_id="kept", keep=True)
        job.cancel()
        with Client(engine.endpoint) as another:
            found = another.submit([[5, 6]], PARAMS, job_id="kept", keep=True).results()
            assert found[0].error is None, "it is forgotten"


def test_a_kept_job_that_is_cancelled_while_it_runs_is_forgotten_at_once(engine: FlexGenLite) -> None:
    for _ in range(5):
        with Client(engine.endpoint) as client:
            job = client.submit(PROMPTS, LONG, job_id="running", keep=True)
            while not engine.status().running:
                time.sleep(0.01)
            job.cancel()
            found = client.submit([[7, 8]], PARAMS, job_id="running", keep=True)
            assert found.results()[0].error is None, "for this client, too"
            found.cancel()
        with Client(engine.endpoint) as client:
            found = client.submit([[5, 6]], PARAMS, job_id="running", keep=True)
            assert found.results()[0].error is None
            found.cancel()
    wait_idle(engine)


def test_a_kept_job_goes_on_though_its_client_is_closed_at_once(engine: FlexGenLite, expected: list[list[int]]) -> None:
    before = generated(engine)
    with Client(engine.endpoint) as client:
        client.submit(PROMPTS, PARAMS, job_id="closed", keep=True)
    while generated(engine) - before < sum(map(len, expected)):
        time.sleep(0.05)
    with Client(engine.endpoint) as client:
        job = client.submit(PROMPTS, PARAMS, job_id="closed", keep=True)
        assert [list(c.token_ids) for c in job.results()] == expected
        job.cancel()
    assert generated(engine) - before == sum(map(len, expected)), "every request once"


def test_a_kept_job_is_taken_over_while_it_runs(engine: FlexGenLite, expected: list[list[int]]) -> None:
    before = generated(engine)
    vanish(engine, "taken over", "keep")
    with Client(engine.endpoint) as client:
        job = client.submit(PROMPTS, PARAMS, job_id="taken over", keep=True)
        assert [list(c.token_ids) for c in job.results()] == expected
    assert generated(engine) - before == sum(map(len, expected))


def test_a_job_that_is_not_kept_ends_with_its_client(engine: FlexGenLite, expected: list[list[int]]) -> None:
    vanish(engine, "not kept", "drop")
    assert tokens(engine) == expected
    wait_idle(engine)


def test_one_client_cannot_open_the_same_job_twice(engine: FlexGenLite) -> None:
    with Client(engine.endpoint) as client:
        job = client.submit(PROMPTS, PARAMS, job_id="twice")
        with pytest.raises(EngineError, match="open already on this client"):
            client.submit(PROMPTS, PARAMS, job_id="twice")
        job.cancel()


def damaged(draw: random.Random) -> list[bytes]:
    """Frames that are nearly a message."""
    request = WireRequest(0, (5, 6, 7), PARAMS.to_wire())
    good = ENCODE(
        draw.choice([Connect(3), Submit("j", (request,) * draw.randrange(4), False), Cancel("j"), GetStatus()])
    )
    match draw.randrange(8):
        case 0:
            return [draw.randbytes(draw.randrange(200))]
        case 1:
            return [good[: draw.randrange(len(good))]]
        case 2:
            at, changed = draw.randrange(len(good)), bytearray(good)
            changed[at] ^= 1 << draw.randrange(8)
            return [bytes(changed)]
        case 3:
            return [b"\x91" * draw.choice([10, 1000, 100_000]) + good]
        case 4:
            return [draw.choice([b"\xdd", b"\xdf", b"\xc6", b"\xdb"]) + b"\xff\xff\xff\xff" + good]
        case 5:
            return [good] * draw.randrange(2, 5)
        case 6:
            return [b""]
        case _:
            at = draw.randrange(len(good))
            return [good[:at] + draw.randbytes(draw.randrange(1, 6)) + good[at:]]


def test_thousands_of_damaged_messages(
    engine: FlexGenLite, expected: list[list[int]], raw: zmq.Socket[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(4)
    job = engine.submit(PROMPTS, PARAMS)
    before = coordinator_bytes(engine)
    for _ in range(5000):
        raw.send_multipart(damaged(draw))
        while raw.poll(0):
            raw.recv_multipart()
    assert [list(c.token_ids) for c in job.results()] == expected
    wait_idle(engine)
    assert tokens(engine) == expected
    assert coordinator_bytes(engine) - before < 40e6
    assert "Traceback" not in capfd.readouterr().err


def test_a_message_that_is_too_long_ends_the_connection_of_its_sender(
    engine: FlexGenLite, expected: list[list[int]], raw: zmq.Socket[bytes]
) -> None:
    before = coordinator_bytes(engine)
    raw.send(b"\x00" * (MAX_MESSAGE_BYTES + 1))
    assert tokens(engine) == expected
    assert coordinator_bytes(engine) - before < 40e6


def test_a_flood_is_refused_beyond_the_window(
    engine: FlexGenLite, expected: list[list[int]], raw: zmq.Socket[bytes]
) -> None:
    long = SamplingParams(max_tokens=200, temperature=0, ignore_eos=True).to_wire()
    for part in range(20):
        indices = range(part * 512, part * 512 + 512)
        raw.send(ENCODE(Submit("flood", tuple(WireRequest(i, (5, 6, 7), long) for i in indices), False)))
    refused = 0
    while refused < 20 * 512 - MAX_OPEN - 512:  # some may have ended meanwhile
        message = DECODE(raw.recv())
        assert isinstance(message, RequestDone)
        refused += message.error is not None and "are open already" in message.error
    raw.send(ENCODE(Cancel("flood")))
    assert tokens(engine) == expected
    wait_idle(engine)


def test_a_client_that_does_not_read_is_dropped(
    engine: FlexGenLite, expected: list[list[int]], raw: zmq.Socket[bytes]
) -> None:
    """Refusals are answered at once, so they pile up first. It is told when it reads on."""
    before = coordinator_bytes(engine)
    bad = SamplingParams(max_tokens=2, stop_token_ids=[10**6]).to_wire()
    for part in range(100):
        raw.send(ENCODE(Submit(f"deaf {part}", tuple(WireRequest(i, (5,), bad) for i in range(1000)), False)))
    assert tokens(engine) == expected
    assert coordinator_bytes(engine) - before < 60e6
    while raw.poll(1000):
        raw.recv()
    raw.send(ENCODE(GetStatus()))  # as a client does that has heard nothing for a while
    message = DECODE(raw.recv())
    assert isinstance(message, EngineFailed) and "was given up" in message.message


def test_many_clients_at_once(engine: FlexGenLite, expected: list[list[int]]) -> None:
    clients = [Client(engine.endpoint) for _ in range(20)]
    jobs = [client.submit(PROMPTS[number : number + 12], PARAMS) for number, client in enumerate(clients)]
    for number, job in enumerate(jobs):
        assert [list(c.token_ids) for c in job.results()] == expected[number : number + 12]
    for client in clients:
        client.close()


def test_a_reader_of_streams_may_stand_still(engine: FlexGenLite) -> None:
    """What it is told is held back meanwhile: more than the socket would take."""
    before = engine.status().done

    def wait_until(done: int, submitted: int) -> None:
        deadline = time.monotonic() + 60
        while (status := engine.status()).done - before < done or status.running + status.waiting < submitted:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    command = [sys.executable, "-c", STREAMING, engine.endpoint]
    with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_until(done=0, submitted=200)
            psutil.Process(process.pid).suspend()
            wait_until(done=200, submitted=0)
            psutil.Process(process.pid).resume()
            assert process.communicate(timeout=60)[0] == f"{200 * 110}\n"
        finally:
            process.kill()

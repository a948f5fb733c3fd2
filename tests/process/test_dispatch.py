"""Two engines behind one queue, as their users meet them: the same tokens, work for both, losses that nobody sees."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from flexgen_lite import Client, FlexGenLite, SamplingParams
from flexgen_lite.client.completion import Completion
from flexgen_lite.text.sizes import parse_size
from tests.chat_model import make_quick_model
from tests.engine_processes import own_children, survivors
from tests.http_server import TEMPLATE, server
from tests.tiny_models import ragged_prompts, reference_tokens

pytestmark = pytest.mark.timeout(180)
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "engines": 2, "ram": "3GiB", "attention_workers": 1, "attention_threads": 1,
    "compute_threads": 1, "max_sequences": 4, "micro_batches": 1, "micro_batch_tokens": 64,
}  # fmt: skip
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=120, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick_model(tmp_path_factory.mktemp("dispatch"), TEMPLATE)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[FlexGenLite]:
    with FlexGenLite(model, **SETTINGS) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(model: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts, and the answers to them."""
    prompts = [[3 + token % 250 for token in prompt] for prompt in ragged_prompts(24, longest=30)]
    return prompts, reference_tokens(model, prompts, 120)


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [list(completion.token_ids) for completion in completions]


def wait_until(true: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def engines_of(dispatcher: int) -> list[psutil.Process]:
    """Their coordinators."""
    return [child for child in psutil.Process(dispatcher).children() if "flexgen_lite.engine" in child.cmdline()]


class Behind:
    """The engines as they are to who goes around the queue."""

    def __init__(self, engine: FlexGenLite) -> None:
        run_dir = Path(engine.endpoint.removeprefix("ipc://")).parent
        self.clients = [Client(f"ipc://{path}") for path in sorted(run_dir.glob("*/engine.sock"))]

    def __enter__(self) -> list[Client]:
        return self.clients

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.close()


def test_the_same_tokens_from_both(engine: FlexGenLite, reference: tuple[list[list[int]], list[list[int]]]) -> None:
    prompts, expected = reference
    with Behind(engine) as behind:
        before = [client.status().done for client in behind]
        assert tokens(engine.generate(prompts, GREEDY)) == [answer[:12] for answer in expected]
        done = [client.status().done - was for client, was in zip(behind, before, strict=True)]
    assert len(done) == 2 and sum(done) == 24 and min(done) >= 4, "both work"
    status = engine.status()
    assert (status.done, status.running, status.waiting) == (24, 0, 0)
    assert status.totals["requests_done"] == 24 and status.totals["generated_tokens"] == 24 * 12
    assert status.totals["busy_seconds"] > 0 and 0 < status.memory["used"] <= status.memory["budget"] == 3 << 30
    assert {"dispatcher", "engine 0 coordinator", "engine 1 compute worker"} <= status.processes.keys()
    assert engine.plan.startswith("engines   2 behind one queue: engine 0 on CPUs 0") and "shared" in engine.plan


def test_each_has_its_own_processors(engine: FlexGenLite) -> None:
    cpus = [set(process.cpu_affinity()) for process in engines_of(engine.engine_pid)]
    assert len(cpus) == 2 and not cpus[0] & cpus[1] and cpus[0] | cpus[1] == os.sched_getaffinity(0)


def test_who_is_done_takes_from_the_other(
    engine: FlexGenLite, reference: tuple[list[list[int]], list[list[int]]]
) -> None:
    """Every other answer is long, and with that all of one engine's."""
    prompts, expected = reference
    params = [LONG if number % 2 == 0 else SamplingParams(max_tokens=1, temperature=0) for number in range(24)]
    with Behind(engine) as behind:
        before = [client.status().done for client in behind]
        found = tokens(engine.generate(prompts, params))
        done = sorted(client.status().done - was for client, was in zip(behind, before, strict=True))
    assert found == [answer[: 120 if number % 2 == 0 else 1] for number, answer in enumerate(expected)]
    assert sum(done) == 24 and done[0] < 12, "some were moved"


@pytest.mark.parametrize("killed", [1, 2])
def test_lost_engines(engine: FlexGenLite, reference: tuple[list[list[int]], list[list[int]]], killed: int) -> None:
    prompts, expected = reference
    before = engine.engine_restarts
    assert engine.status().totals["engine_restarts"] == before
    job = engine.submit(prompts, LONG)
    completions = [next(job)]
    lost = engines_of(engine.engine_pid)[:killed]
    for process in lost:
        process.kill()
    completions += list(job)
    assert tokens(sorted(completions, key=lambda completion: completion.index)) == expected, "each once"
    wait_until(lambda: len(set(engines_of(engine.engine_pid)) - set(lost)) == 2)
    assert tokens(engine.generate(prompts, GREEDY)) == [answer[:12] for answer in expected]
    wait_until(lambda: engine.status().totals["engine_restarts"] == before + killed)
    wait_until(lambda: engine.engine_restarts == before + killed)


def test_a_stream_over_a_lost_engine(engine: FlexGenLite, reference: tuple[list[list[int]], list[list[int]]]) -> None:
    prompts, expected = reference
    wait_until(lambda: len(engines_of(engine.engine_pid)) == 2)
    stream = engine.stream(prompts[3], LONG)
    told = [next(stream), next(stream)]
    for process in engines_of(engine.engine_pid):
        process.kill()
    told += stream
    assert [token for delta in told for token in delta.token_ids] == expected[3]
    assert told[-1].finish_reason == "length"
    assert "".join(delta.text for delta in told) == engine.generate(prompts[3], LONG).text


def test_cancelled(engine: FlexGenLite, reference: tuple[list[list[int]], list[list[int]]]) -> None:
    prompts, expected = reference
    with engine.connect() as client:
        job = client.submit(prompts * 20, LONG)
        first = next(job)
        assert list(first.token_ids) == expected[first.index % 24]
        job.cancel()
        rest = list(job)
        assert len(rest) == 479 and sum(one.finish_reason == "cancelled" for one in rest) > 400
        wait_until(lambda: client.status().running + client.status().waiting == 0)
    assert tokens(engine.generate(prompts[:2], GREEDY)) == [answer[:12] for answer in expected[:2]]


def test_a_client_that_leaves_without_a_word(engine: FlexGenLite) -> None:
    program = f"""
import os
from flexgen_lite import Client, SamplingParams
client = Client({engine.endpoint!r})
job = client.submit([[5, 6, 7]] * 400, SamplingParams(max_tokens=120, ignore_eos=True))
next(job)
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
    wait_until(lambda: engine.status().running + engine.status().waiting == 0)


def test_a_kept_job(engine: FlexGenLite, reference: tuple[list[list[int]], list[list[int]]]) -> None:
    prompts, expected = reference
    sampled = SamplingParams(max_tokens=12, temperature=0.9, ignore_eos=True)
    with engine.connect() as client:
        client.submit(prompts, GREEDY, job_id="greedy", keep=True)
        client.submit(prompts[:6], sampled, job_id="sampled", keep=True)
    found = []
    for _ in range(2):
        with engine.connect() as client:
            assert tokens(client.submit(prompts, GREEDY, job_id="greedy", keep=True).results()) == [
                answer[:12] for answer in expected
            ]
            found.append(tokens(client.submit(prompts[:6], sampled, job_id="sampled", keep=True).results()))
    assert found[0] == found[1], "kept, not drawn again"
    with engine.connect() as client:
        for job_id, few in (("greedy", prompts), ("sampled", prompts[:6])):
            job = client.submit(few, GREEDY if job_id == "greedy" else sampled, job_id=job_id, keep=True)
            job.results()
            job.cancel()


def test_several_clients_at_once(engine: FlexGenLite, reference: tuple[list[list[int]], list[list[int]]]) -> None:
    prompts, expected = reference
    found: dict[int, list[list[int]]] = {}

    def ask(number: int) -> None:
        with engine.connect() as client:
            found[number] = tokens(client.submit(prompts, GREEDY, priority=number % 2).results())

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert found == {number: [answer[:12] for answer in expected] for number in range(3)}


def run_batch(model: Path, requests: Path, output: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flexgen_lite", "run-batch", "-i", str(requests), "-o", str(output), "--json"]
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items() if key != "engines"]
    return subprocess.Popen(
        [*command, "--model", str(model), "--engines", "2", *settings, *options],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_batch_that_is_interrupted(model: Path, engine: FlexGenLite, runtime: Path, tmp_path: Path) -> None:
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = [{"prompt": f"record {n}: ", "max_tokens": 40, "temperature": 0, "ignore_eos": True} for n in range(150)]
    requests.write_text(
        "".join(
            json.dumps({"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
            for n, body in enumerate(bodies)
        )
    )
    run = run_batch(model, requests, output)
    wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 10)
    left = [child for child in own_children() if is_of(child, run.pid)]
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 143
    kept = output.read_bytes().count(b"\n")
    assert kept < 150 and left and not survivors(left, 5)
    run = run_batch(model, requests, output)
    text, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    events = [json.loads(line) for line in text.splitlines()]
    assert (events[-1]["done"], events[-1]["earlier"], events[-1]["failed"]) == (150, kept, 0)
    assert sum("2 engines: nothing is predicted" in event.get("message", "") for event in events) == 1
    rows = {row["custom_id"]: row for row in map(json.loads, output.read_text().splitlines())}
    found = [rows[str(n)]["response"]["body"]["choices"][0]["text"] for n in range(150)]
    wanted = engine.generate([body["prompt"] for body in bodies], SamplingParams(40, temperature=0, ignore_eos=True))
    assert found == [completion.text for completion in wanted]
    refused = run_batch(model, requests, output, "--allow", "dtype=bfloat16")
    assert "--allow and engines=2 exclude each other" in refused.communicate(timeout=60)[0]
    assert refused.returncode == 2


def test_too_little_ram(model: Path, tmp_path: Path) -> None:
    """What is allowed is what was given, and what is named is enough."""
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_text('{"prompt": "one", "max_tokens": 2}\n')
    for given in ("100MiB", "200MiB"):
        refusal, _ = run_batch(model, requests, output, "--ram", given).communicate(timeout=120)
        found = re.search(r"in 2 engines needs at least (\S+ \w+) of RAM, (\S+ \w+) allowed: raise ram", refusal)
        assert found, refusal
        assert found[2] == f"{given[:3]}.0 MiB"
    enough = run_batch(model, requests, output, "--ram", str(parse_size(found[1].replace(" ", "")) + (1 << 20)))
    _, errors = enough.communicate(timeout=120)
    assert enough.returncode == 0, errors


def is_of(process: psutil.Process, ancestor: int) -> bool:
    try:
        return any(parent.pid == ancestor for parent in process.parents())
    except psutil.NoSuchProcess:
        return False


def test_over_http(model: Path, engine: FlexGenLite) -> None:
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items() if key not in ("engines", "ram", "dtype")]
    with server(model, "--engines", "2", "--ram", "3GiB", *settings) as (url, _):
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        messages: list[Any] = [{"role": "user", "content": "john"}]
        answer = client.chat.completions.create(model=str(model), messages=messages, temperature=0, max_tokens=12)
        stream = client.chat.completions.create(
            model=str(model), messages=messages, temperature=0, max_tokens=12, stream=True
        )
        told = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    found = engine.chat(messages, SamplingParams(max_tokens=12, temperature=0))
    assert answer.choices[0].message.content == found.text == told


def test_health_while_engines_are_started_again(model: Path) -> None:
    """It is good for as long as one of them is there."""
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items() if key not in ("engines", "ram", "dtype")]
    with server(model, "--engines", "2", "--ram", "3GiB", *settings) as (url, process), httpx.Client() as caller:

        def get(path: str) -> httpx.Response:
            return caller.get(url.replace("/v1", path), timeout=30)

        def restarts() -> int:
            found = re.search(r"^flexgen_lite_engine_restarts_total (\d+)$", get("/metrics").text, re.MULTILINE)
            return int(found[1]) if found else -1

        children = psutil.Process(process.pid).children()
        (dispatcher,) = (child.pid for child in children if "flexgen_lite.dispatch" in child.cmdline())
        one, _ = engines_of(dispatcher)
        one.kill()
        wait_until(lambda: get("/health").status_code != 200 or restarts() == 1)
        assert get("/health").status_code == 200
        wait_until(lambda: len(set(engines_of(dispatcher)) - {one}) == 2)
        for engine in engines_of(dispatcher):
            engine.kill()
        wait_until(lambda: get("/health").status_code == 503)
        for path in ("/health", "/metrics"):
            assert "no other engine is open, and one is being started again" in get(path).text
        wait_until(lambda: get("/health").status_code == 200)
        assert restarts() >= 2

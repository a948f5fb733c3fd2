"""The death of a real engine in the middle of everything: its owner starts another one, and everything comes to the
same end as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexgen_lite import EngineError, FlexGenLite, SamplingParams
from flexgen_lite.client.completion import Completion, Delta
from flexgen_lite.client.request import Request
from tests.chat_model import make_quick_model
from tests.engine_processes import own_children, survivors, workers_of

pytestmark = pytest.mark.timeout(600)
NUM_LINES = 100
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
SETTINGS = {
    "dtype": "float32", "ram": "1GiB", "attention_workers": 2, "attention_threads": 1, "layer_slots": 2,
    "max_sequences": 12,
}  # fmt: skip
"""Few sequences at once: there is a middle of the work, though the model is quick."""
SAMPLED = SamplingParams(max_tokens=40, temperature=0.9, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_quick_model(tmp_path_factory.mktemp("outlive"), TEMPLATE)


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def coordinators_of(pid: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie, which has no command line
            found += [child] * ("flexgen_lite.engine" in child.cmdline())
    return found


def kill_engine_of(pid: int) -> list[psutil.Process]:
    """Its coordinator, as the system does when memory runs out; the engine's processes."""
    (coordinator,) = coordinators_of(pid)
    processes = [coordinator, *workers_of(coordinator.pid).values()]
    coordinator.kill()
    return processes


BODIES: list[dict[str, Any]] = [
    {"temperature": 0, "logprobs": 2},
    {"temperature": 0.8, "seed": 5, "n": 3, "return_token_ids": True},
    {"temperature": 1.1, "seed": 9, "top_k": 20, "stop": ["a1", "zz"], "echo": True},
    {"temperature": 0.7, "seed": 1, "repetition_penalty": 1.2, "prompt_logprobs": 1},
]


@pytest.fixture(scope="module")
def requests(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"
    with path.open("w") as file:
        for number in range(NUM_LINES):
            body = {"prompt": f"record {number}: ", "max_tokens": 16, "ignore_eos": True, **BODIES[number % 4]}
            line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
        file.write("{broken\n")
    return path


def run_batch(model: Path, requests: Path | str, output: Path | str, **pipes: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flexgen_lite", "run-batch", "-i", str(requests), "-o", str(output)]
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes}
    return subprocess.Popen([*command, "--model", str(model), "--json", *settings], text=True, **pipes)


def answers(rows: str) -> list[str]:
    """What the rows say, without what differs from run to run."""
    found = []
    for line in rows.splitlines():
        row = json.loads(line)
        body = row["response"]["body"] or {}
        kept = [row["custom_id"], row["error"], row["response"]["request_id"], body.get("choices"), body.get("usage")]
        found.append(json.dumps(kept))
    return sorted(found)


def rows_in(output: Path) -> int:
    return output.read_bytes().count(b"\n") if output.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(model: Path, requests: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    _, errors = run_batch(model, requests, output).communicate(timeout=300)
    assert rows_in(output) == NUM_LINES + 1, errors
    return answers(output.read_text())


def test_a_batch(model: Path, requests: Path, undisturbed: list[str], runtime: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run = run_batch(model, requests, output)
    for num_rows in (5, 40):
        wait_until(lambda num_rows=num_rows: rows_in(output) >= num_rows)  # type: ignore[misc]
        left = kill_engine_of(run.pid)
        wait_until(lambda left=left: bool(set(coordinators_of(run.pid)) - set(left)))  # type: ignore[misc]
        assert not survivors(left, 2)
    text, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    events = [json.loads(line) for line in text.splitlines()]
    told = [event["message"] for event in events if event["event"] == "warning"]
    assert len(told) == 2 and all("killed by SIGKILL; starting it again; " in message for message in told)
    last = events[-1]
    assert (last["event"], last["done"], last["failed"], last["engine_restarts"]) == ("done", NUM_LINES + 1, 1, 2)
    assert last["generated_tokens"] >= NUM_LINES * 16 and last["busy_seconds"] > 0 and last["peak_bytes"] > 0
    assert answers(output.read_text()) == undisturbed


def test_a_batch_between_pipes(
    model: Path, requests: Path, undisturbed: list[str], runtime: Path, tmp_path: Path
) -> None:
    """What has been read is not there any more, what has been written cannot be looked at."""
    with (tmp_path / "events").open("w") as events:
        run = run_batch(model, "/dev/stdin", "/dev/stdout", stdin=subprocess.PIPE, stderr=events)
        assert run.stdin is not None and run.stdout is not None
        run.stdin.write(requests.read_text())
        run.stdin.close()
        rows = [run.stdout.readline() for _ in range(20)]
        kill_engine_of(run.pid)
        rows += run.stdout.readlines()
        assert run.wait(300) == 0, (tmp_path / "events").read_text()
    assert answers("".join(rows)) == undisturbed
    assert '"engine_restarts": 1' in (tmp_path / "events").read_text().splitlines()[-1]


def test_a_batch_that_is_interrupted_while_its_engine_starts_again(
    model: Path, requests: Path, undisturbed: list[str], runtime: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run = run_batch(model, requests, output)
    wait_until(lambda: rows_in(output) >= 5)
    left = kill_engine_of(run.pid)
    wait_until(lambda: bool(set(coordinators_of(run.pid)) - set(left)))
    left += coordinators_of(run.pid)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=30)
    assert run.returncode == 143
    assert not survivors(left, 5)
    kept = rows_in(output)
    run = run_batch(model, requests, output)
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and json.loads(text.splitlines()[-1])["earlier"] == kept
    assert answers(output.read_text()) == undisturbed


@pytest.fixture
def engine(model: Path, runtime: Path) -> Iterator[FlexGenLite]:
    before = psutil.Process().num_fds()
    with FlexGenLite(model, **SETTINGS) as engine:
        yield engine
    wait_until(lambda: psutil.Process().num_fds() <= before, 10)
    assert not own_children()


def prompts(count: int) -> Iterator[str]:
    for number in range(count):
        yield f"record {number}: "


def test_jobs_of_python(engine: FlexGenLite, caplog: pytest.LogCaptureFixture) -> None:
    """A generator that is not at its end, streams in their middle, and threads that wait."""
    unseeded = SamplingParams(max_tokens=80, temperature=1.0, n=2, logprobs=1, ignore_eos=True)
    expected = [completion.token_ids for completion in engine.generate(list(prompts(60)), SAMPLED)]
    alone = engine.generate("x", SAMPLED)
    told: list[Delta | Completion] = []
    whole: list[Any] = []

    def stream() -> None:
        told.extend(engine._client.submit_requests([Request("x", unseeded, stream=True)], 1).events())

    def wait() -> None:
        whole.append(engine.generate("x", SAMPLED))

    job = engine.submit(prompts(60), SAMPLED)
    found = [next(job) for _ in range(10)]
    others = [threading.Thread(target=other) for other in (stream, wait)]
    for other in others:
        other.start()
    wait_until(lambda: len(told) >= 20)
    os.kill(engine._engine.pid, signal.SIGKILL)
    found += job.results()
    for other in others:
        other.join(120)
    assert [c.token_ids for c in sorted(found, key=lambda c: c.index)] == expected
    assert whole[0].text == alone.text and whole[0].token_ids == alone.token_ids
    *deltas, last = told
    assert isinstance(last, Completion) and len(last.outputs) == 2
    for number, output in enumerate(last.outputs):
        parts = [delta for delta in deltas if isinstance(delta, Delta) and delta.number == number]
        assert "".join(part.text for part in parts) == output.text
        assert [token for part in parts for token in part.token_ids] == output.token_ids
        assert [place for part in parts for place in part.logprobs or ()] == output.logprobs
        assert [part.finish_reason for part in parts][-2:] == [None, "length"]
    assert engine.engine_restarts == 1 and engine.status().totals["engine_restarts"] == 1
    (warning,) = [record for record in caplog.records if "starting it again" in record.getMessage()]
    assert warning.levelno == logging.WARNING and "open requests are submitted" in warning.getMessage()


def test_a_model_that_was_written_anew(model: Path, runtime: Path, tmp_path: Path) -> None:
    """With files of the same size, while no engine had them open: answers of two models are not mixed."""
    folder = make_quick_model(tmp_path, TEMPLATE)
    with FlexGenLite(folder, **SETTINGS) as engine:
        job = engine.submit(["x"] * 300, SAMPLED)
        next(job)
        shard = next(folder.glob("*.safetensors"))
        content = shard.read_bytes()
        os.kill(engine._engine.pid, signal.SIGKILL)
        shard.unlink()
        shard.write_bytes(content)
        with pytest.raises(EngineError, match="changed while it was in use") as caught:
            job.results()
        assert caught.value.user_error

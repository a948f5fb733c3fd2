"""run-batch and launch from end to end, in front of a fake engine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite.wire.client_messages import EngineFailed, RequestDone, Submit, WireOutput
from tests import fake_coordinator
from tests.fake_engine import FakeEngine, answer

pytestmark = pytest.mark.timeout(60)

WITH_FAKE_COORDINATOR = f"""
import signal, sys
from flexgen_lite.cli import main
from flexgen_lite.launcher import process
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background, it is ignored
process.COMMAND = [sys.executable, {fake_coordinator.__file__!r}, sys.argv.pop(1)]
main.main()
"""


@pytest.fixture(autouse=True)
def runtime_base(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    return base


def start(*args: str | Path, mode: str = "serves") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WITH_FAKE_COORDINATOR, mode, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*args: str | Path, mode: str = "serves") -> tuple[int, str, str]:
    program = start(*args, mode=mode)
    output, errors = program.communicate(timeout=40)
    assert "Traceback" not in errors
    return program.returncode, output, errors


def write_requests(path: Path, prompts: list[Any], **body: object) -> Path:
    lines = [
        {"custom_id": f"id-{n}", "method": "POST", "url": "/v1/completions", "body": {"prompt": prompt, **body}}
        for n, prompt in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows(path: Path) -> dict[str | None, dict[str, Any]]:
    text = path.read_text()
    assert text == "" or text.endswith("\n")
    parsed = [json.loads(line) for line in text.splitlines()]
    assert len({row["custom_id"] for row in parsed}) == len(parsed)
    return {row["custom_id"]: row for row in parsed}


def test_on_an_engine_of_its_own(tmp_path: Path, runtime_base: Path) -> None:
    requests = write_requests(tmp_path / "in", [f"prompt {n}" for n in range(1000)], return_token_ids=True)
    with requests.open("a") as file:
        file.write("{broken\n")
    code, output, errors = run("run-batch", "-i", requests, "-o", tmp_path / "out", "--model", "m")
    assert code == 0, errors
    found = rows(tmp_path / "out")
    assert len(found) == 1001
    for n in (0, 500, 999):
        (choice,) = found[f"id-{n}"]["response"]["body"]["choices"]
        assert choice["text"] == f"PROMPT {n}"
        assert len(choice["token_ids"]) == found[f"id-{n}"]["response"]["body"]["usage"]["completion_tokens"]
    assert "line 1001: not JSON" in found[None]["error"]["message"]
    assert re.fullmatch(
        r"done: 1001 requests \(1 failed\), \d+ prompt tokens, \d+ generated tokens in 500\.0 s, [\d.]+ tok/s; "
        r"busiest lane compute 90%; peak memory 2\.0 GiB of 4\.0 GiB\n",
        output,
    ), output
    assert "weights: 1.0 GiB" in errors
    assert list(runtime_base.iterdir()) == []


def test_on_a_running_engine(tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in", ["a", "b"], model="another")
    with FakeEngine(tmp_path / "e") as engine:
        args = ["run-batch", "-i", requests, "-o", tmp_path / "out", "--endpoint", engine.endpoint]
        code, output, errors = run(*args, "--model", "fake")
        assert code == 0, errors
        assert "warning: requests name the model 'another'; 'fake' answers them" in errors
        assert output.startswith("done: 2 requests (0 failed)")
        code, _, errors = run(*args, "--overwrite", "--model", "other")
        assert (code, errors) == (2, f"error: the engine at {engine.endpoint} serves fake, not other\n")
    assert set(rows(tmp_path / "out")) == {"id-0", "id-1"}


def test_requests_that_the_engine_refuses(tmp_path: Path) -> None:
    def refuse(submit: Submit) -> list[object]:
        return [answer(submit.job_id, r, "too long" if r.prompt == "long" else None) for r in submit.requests]

    requests = write_requests(tmp_path / "in", ["a", "long", "b"])
    with FakeEngine(tmp_path / "e", on_submit=refuse) as engine:
        args = ["run-batch", "-i", requests, "-o", tmp_path / "out", "--endpoint", engine.endpoint]
        code, output, _ = run(*args)
    assert code == 0
    assert output.startswith("done: 3 requests (1 failed)")
    assert rows(tmp_path / "out")["id-1"]["error"]["message"] == "too long"


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_rows_on_standard_output_are_alone_there(tmp_path: Path, how: list[str]) -> None:
    """Also where that is a file, which the summary would be written into from the beginning."""
    requests = write_requests(tmp_path / "in", ["a", "b", "c"])
    with (tmp_path / "out").open("w") as out:
        command = [sys.executable, "-c", WITH_FAKE_COORDINATOR, "serves", "run-batch", "-i", str(requests)]
        command += ["-o", "/dev/stdout", "--model", "m", *how]
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=True, timeout=40)
    assert rows(tmp_path / "out").keys() == {"id-0", "id-1", "id-2"}
    assert "done" in done.stderr


@pytest.mark.parametrize("name", ["in", "out", "link"])
def test_a_trace_takes_the_place_of_no_file(tmp_path: Path, name: str) -> None:
    requests = write_requests(tmp_path / "in", ["a"])
    (tmp_path / "link").symlink_to(requests)
    before = requests.read_text()
    arguments = ["-i", requests, "-o", tmp_path / "out", "--model", "m", "--trace", tmp_path / name]
    code, _, errors = run("run-batch", *arguments)
    assert code == 2 and "give another file for the trace" in errors
    assert requests.read_text() == before and not (tmp_path / "out").exists()


def test_an_answer_that_is_not_whole_is_no_row(tmp_path: Path) -> None:
    """Some answers of a request may be done when it is cancelled."""
    requests = write_requests(tmp_path / "in", ["a", "b"], n=2)

    def halfway(job_id: str, index: int) -> RequestDone:
        outputs = tuple(WireOutput("x", (1,), reason) for reason in ("stop", "cancelled" if index else "stop"))
        return RequestDone(job_id, index, 1, outputs)

    def reply(submit: Submit) -> list[Any]:
        return [halfway(submit.job_id, request.index) for request in submit.requests]

    with FakeEngine(tmp_path / "e", on_submit=reply) as engine:
        code, _, errors = run("run-batch", "-i", requests, "-o", tmp_path / "out", "--endpoint", engine.endpoint)
    assert code == 0, errors
    assert rows(tmp_path / "out").keys() == {"id-0"}


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("\n")
    code, output, errors = run("run-batch", "-i", tmp_path / "in", "-o", tmp_path / "out", "--model", "m")
    assert (code, output.split(",")[0]) == (0, "done: 0 requests (0 failed)")
    assert f"warning: {tmp_path / 'in'} has no requests: give one JSON object a line" in errors
    assert rows(tmp_path / "out") == {}


def test_a_file_in_another_encoding_is_told_of_before_the_engine_is_started(tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in", ["é"])
    requests.write_bytes(requests.read_text().encode("utf-16"))
    code, output, errors = run("run-batch", "-i", requests, "-o", tmp_path / "out", "--model", "m", mode="dies at once")
    assert (code, output, errors) == (2, "", f"error: {requests} is in UTF-16: save it as UTF-8\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_pipe_in_each_encoding(encoding: str, tmp_path: Path) -> None:
    data = write_requests(tmp_path / "in", ["one", "two"]).read_text().encode(encoding)
    os.mkfifo(tmp_path / "pipe")
    with FakeEngine(tmp_path / "e") as engine:
        program = start(
            "run-batch", "-i", tmp_path / "pipe", "-o", tmp_path / "out", "--endpoint", engine.endpoint, "--quiet"
        )
        (tmp_path / "pipe").write_bytes(data)
        _, errors = program.communicate(timeout=40)
    if encoding == "utf-16":
        assert (program.returncode, errors) == (2, f"error: {tmp_path / 'pipe'} is in UTF-16: save it as UTF-8\n")
    else:
        assert program.returncode == 0 and rows(tmp_path / "out").keys() == {"id-0", "id-1"}


def test_rows_are_the_same_lines_to_every_reader(tmp_path: Path) -> None:
    ends = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"
    requests = write_requests(tmp_path / "in", [f"a{end}b" for end in ends])
    with FakeEngine(tmp_path / "e") as engine:
        assert run("run-batch", "-i", requests, "-o", tmp_path / "out", "--endpoint", engine.endpoint)[0] == 0
    found = (tmp_path / "out").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["response"]["body"]["choices"][0]["text"] for line in found]
    assert sorted(texts) == sorted(f"A{end}B" for end in ends)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_the_rows_there_are(tmp_path: Path, number: signal.Signals, code: int) -> None:
    def answer_first(submit: Submit) -> list[object]:
        return [answer(submit.job_id, r) for r in submit.requests if r.index < 3]

    requests = write_requests(tmp_path / "in", ["x"] * 50)
    with FakeEngine(tmp_path / "e", on_submit=answer_first, window=3) as engine:
        program = start("run-batch", "-i", requests, "-o", tmp_path / "out", "--endpoint", engine.endpoint)
        while engine.next_of(Submit).requests[-1].index < 5:  # the first three have come back by then
            pass
        program.send_signal(number)
        _, errors = program.communicate(timeout=20)
    assert (program.returncode, errors) == (code, "stopped\n")
    assert set(rows(tmp_path / "out")) <= {"id-0", "id-1", "id-2"}


def test_an_engine_that_fails_on_the_way(tmp_path: Path) -> None:
    def answer_then_fail(submit: Submit) -> list[object]:
        return [answer(submit.job_id, r) for r in submit.requests[:1]] + [EngineFailed("the loader died")]

    requests = write_requests(tmp_path / "in", ["x"] * 50)
    with FakeEngine(tmp_path / "e", on_submit=answer_then_fail) as engine:
        args = ["run-batch", "-i", requests, "-o", tmp_path / "out", "--endpoint", engine.endpoint]
        code, output, errors = run(*args)
    assert (code, output, errors) == (1, "", "error: the loader died; the same command goes on where it stopped\n")
    assert set(rows(tmp_path / "out")) == {"id-0"}


@pytest.mark.parametrize(("mode", "code"), [("user error", 2), ("failure", 1), ("dies at once", 1)])
def test_an_engine_that_does_not_start(tmp_path: Path, mode: str, code: int) -> None:
    requests = write_requests(tmp_path / "in", ["x"])
    found, _, errors = run("run-batch", "-i", requests, "-o", tmp_path / "out", "--model", "m", mode=mode)
    assert found == code
    assert errors.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_launch_serves_until_it_is_stopped(tmp_path: Path, runtime_base: Path, number: signal.Signals) -> None:
    program = start("launch", "--model", "m")
    assert program.stdout is not None
    line = program.stdout.readline()
    assert line.startswith("endpoint: ")
    endpoint = line.split()[1]
    code, output, _ = run("status", "--endpoint", endpoint)
    assert code == 0
    assert "0 running  ·  0 waiting  ·  0 done" in output
    requests = write_requests(tmp_path / "in", ["a", "b"])
    assert run("run-batch", "-i", requests, "-o", tmp_path / "out", "--endpoint", endpoint)[0] == 0
    program.send_signal(number)
    output, errors = program.communicate(timeout=20)
    assert program.returncode == 0, errors
    assert output.endswith("stopped\n")
    assert errors.startswith("hello from") and "weights: 1.0 GiB\n" in errors
    assert "Traceback" not in errors
    assert list(runtime_base.iterdir()) == []


def test_launch_ends_with_its_engine(runtime_base: Path) -> None:
    program = start("launch", "--model", "m")
    assert program.stdout is not None
    while not program.stdout.readline().startswith("endpoint: "):
        pass
    assert program.stderr is not None
    pid = int(re.fullmatch(r"hello from (\d+)\n", program.stderr.readline())[1])  # type: ignore[index]
    os.kill(pid, signal.SIGKILL)
    _, errors = program.communicate(timeout=20)
    assert program.returncode == 1
    assert errors.endswith("error: the engine ended unexpectedly, killed by SIGKILL\n")
    assert list(runtime_base.iterdir()) == []

"""A batch run that was ended by anything goes on where it stopped."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite.wire.client_messages import Submit
from tests import fake_coordinator
from tests.fake_engine import FakeEngine

pytestmark = pytest.mark.timeout(120)
NUM_LINES = 1200

KILLED_WITHIN_A_ROW = """
import os, signal, sys
from flexgen_lite.cli import main
num_rows, num_bytes, write = int(sys.argv.pop(1)), int(sys.argv.pop(1)), os.write

def write_and_be_killed(fd, data):
    global num_rows
    if bytes(data[:18]) == b'{"id": "batch_req_':
        num_rows -= 1
        if num_rows < 0:
            write(fd, data[:num_bytes])
            os.kill(os.getpid(), signal.SIGKILL)
    return write(fd, data)

os.write = write_and_be_killed
main.main()
"""

WITH_FAKE_COORDINATOR = f"""
import sys
from flexgen_lite.cli import main
from flexgen_lite.launcher import process
process.COMMAND = [sys.executable, {fake_coordinator.__file__!r}, sys.argv.pop(1)]
main.main()
"""


@pytest.fixture(autouse=True)
def runtime_base(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tmp_path_factory.mktemp("r")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    return base


def write_requests(path: Path, count: int = NUM_LINES, **body: object) -> Path:
    """With a bad line and one whose custom_id was used already."""
    with path.open("w") as file:
        for number in range(count):
            row = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps({**row, "body": {"prompt": f"prompt {number}", **body}}) + "\n")
        file.write(
            '{broken\n{"custom_id": "id-0", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}\n'
        )
    return path


def start(requests: Path, output: Path, engine: FakeEngine, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flexgen_lite", "run-batch", "-i", str(requests), "-o", str(output)]
    return subprocess.Popen(
        [*command, "--endpoint", engine.endpoint, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(requests: Path, output: Path, engine: FakeEngine, *more: str) -> tuple[int, str, str]:
    program = start(requests, output, engine, *more)
    text, errors = program.communicate(timeout=100)
    assert "Traceback" not in errors
    return program.returncode, text, errors


def answers(path: Path) -> list[str]:
    """What the rows say, without what differs from run to run."""
    found = []
    for line in path.read_bytes().splitlines():
        row: dict[str, Any] = json.loads(line)
        body = row["response"]["body"] or {}
        found.append(json.dumps([row["custom_id"], row["error"], body.get("choices"), body.get("usage")]))
    return sorted(found)


def submitted(engine: FakeEngine) -> int:
    """Requests that came in since it was last asked."""
    count = 0
    while not engine.received.empty():
        message = engine.received.get()
        count += len(message.requests) if isinstance(message, Submit) else 0
    return count


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_again_and_again(tmp_path: Path) -> None:
    draw = random.Random(2)
    requests, output = write_requests(tmp_path / "in"), tmp_path / "out"
    with FakeEngine(tmp_path / "e", window=32) as engine:
        assert run(requests, tmp_path / "undisturbed", engine)[0] == 0
        submitted(engine)
        for _ in range(4):
            before, more = num_lines(output), draw.randrange(10, 200)
            program = start(requests, output, engine)
            while num_lines(output) < before + more and program.poll() is None:
                time.sleep(0.001)
            program.kill()
            program.communicate()
        kept = num_lines(output)
        submitted(engine)
        code, text, errors = run(requests, output, engine)
        assert code == 0, errors
        assert f"resuming: {kept} rows are there already" in errors
        assert f"done: {NUM_LINES + 2} requests (2 failed, {kept} by earlier runs)" in text
        assert NUM_LINES - kept <= submitted(engine) <= NUM_LINES - kept + 2, "nothing was done twice"
        assert answers(output) == answers(tmp_path / "undisturbed")
        code, text, errors = run(requests, output, engine)
        assert code == 0 and "nothing to do: every line of the input has its row" in errors
        assert submitted(engine) == 0


def test_killed_within_a_row(tmp_path: Path) -> None:
    draw = random.Random(5)
    requests, output = write_requests(tmp_path / "in", 300), tmp_path / "out"
    with FakeEngine(tmp_path / "e") as engine:
        assert run(requests, tmp_path / "undisturbed", engine)[0] == 0
        for _ in range(4):
            before, more = num_lines(output), draw.randrange(60)
            command = [sys.executable, "-c", KILLED_WITHIN_A_ROW, str(more), str(draw.randrange(200)), "run-batch"]
            command += ["-i", str(requests), "-o", str(output), "--endpoint", engine.endpoint]
            assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == -signal.SIGKILL
            assert num_lines(output) == before + more
        assert run(requests, output, engine)[0] == 0
    assert answers(output) == answers(tmp_path / "undisturbed")


@pytest.fixture
def run_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime_base: Path
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Exit code, output and errors of run-batch on an engine of its own, which is in these modes, one a start."""
    starts = tmp_path / "starts"
    monkeypatch.setenv("FAKE_COORDINATOR_STARTS", str(starts))

    def run_with(modes: str, requests: Path, output: Path, *more: str, stdin: bytes = b"") -> tuple[int, str, str]:
        starts.unlink(missing_ok=True)
        command = [sys.executable, "-c", WITH_FAKE_COORDINATOR, modes, "run-batch", "--model", "m"]
        command += ["-i", str(requests), "-o", str(output), *more]
        program = subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=60)
        text, errors = program.stdout.decode(), program.stderr.decode()
        assert "Traceback" not in errors
        return program.returncode, text, errors

    yield run_with
    assert list(runtime_base.iterdir()) == []


RunWith = Callable[..., tuple[int, str, str]]


def test_it_outlives_its_own_engine(tmp_path: Path, run_with: RunWith) -> None:
    requests, output = write_requests(tmp_path / "in", 500), tmp_path / "out"
    assert run_with("serves", requests, tmp_path / "undisturbed")[0] == 0
    code, text, errors = run_with("dies on the way", requests, output)
    assert code == 0 and "done: 502 requests (2 failed)" in text
    found = re.findall(
        r"warning: .* killed by SIGKILL; starting it again; \d+ open requests are submitted again", errors
    )
    assert len(found) >= 2 and f"engine started again: {len(found)}" in text
    assert answers(output) == answers(tmp_path / "undisturbed")
    code, text, errors = run_with("dies on the way", requests, tmp_path / "json", "--json")
    events = [json.loads(line) for line in text.splitlines()]
    told = [event for event in events if "; starting it again" in event.get("message", "")]
    assert code == 0 and events[-1]["engine_restarts"] == len(told) >= 2
    assert json.loads(text.splitlines()[-1])["busy_seconds"] > 0


def test_it_outlives_its_engine_between_two_pipes(tmp_path: Path, run_with: RunWith) -> None:
    """There the same command could not go on."""
    requests = write_requests(tmp_path / "in", 500)
    assert run_with("serves", requests, tmp_path / "undisturbed")[0] == 0
    modes, pipes = "dies on the way,dies by signal,serves", (Path("/dev/stdin"), Path("/dev/stdout"))
    code, text, _ = run_with(modes, *pipes, stdin=requests.read_bytes())
    assert code == 0
    (tmp_path / "out").write_text(text)
    assert answers(tmp_path / "out") == answers(tmp_path / "undisturbed")


def test_an_engine_that_gets_nothing_done(tmp_path: Path, run_with: RunWith) -> None:
    requests, output = write_requests(tmp_path / "in", 500), tmp_path / "out"
    assert run_with("serves", requests, tmp_path / "undisturbed")[0] == 0
    code, text, errors = run_with("dies on the way,dies when asked", requests, output)
    assert (code, text, errors.splitlines()[-1]) == (
        1,
        "",
        "error: the engine ended unexpectedly, killed by SIGKILL; the same command goes on where it stopped",
    )
    assert errors.count("hello from") == 1 + 3 - 1, "the first one had done something, and then died"
    kept = num_lines(output)
    assert 0 < kept < 500 and len(answers(output)) == kept
    code, _, errors = run_with("serves", requests, output)
    assert code == 0 and f"resuming: {kept} rows are there already" in errors
    assert answers(output) == answers(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("modes", "code", "error", "starts"),
    [
        (
            "dies on the way,user error when asked",
            1,
            "error: the model changed; the same command goes on where it stopped",
            2,
        ),
        ("dies on the way,user error", 2, "error: model has no config.json", 2),
        ("dies on the way,serves another model", 2, "error: m changed while it was in use: start anew", 2),
        ("dies by signal,serves", 1, "error: the engine ended unexpectedly, killed by SIGKILL", 1),
    ],
)
def test_what_another_start_would_not_help(
    tmp_path: Path, run_with: RunWith, modes: str, code: int, error: str, starts: int
) -> None:
    requests, output = write_requests(tmp_path / "in", 500), tmp_path / "out"
    found, _, errors = run_with(modes, requests, output)
    assert (found, errors.splitlines()[-1]) == (code, error)
    assert errors.count("hello from") == starts


def test_an_input_that_has_grown(tmp_path: Path) -> None:
    requests, output = write_requests(tmp_path / "in", 50), tmp_path / "out"
    with FakeEngine(tmp_path / "e") as engine:
        assert run(requests, output, engine)[0] == 0
        submitted(engine)
        with requests.open("a") as file:
            row = {"custom_id": "new", "method": "POST", "url": "/v1/completions", "body": {"prompt": "new"}}
            file.write(json.dumps(row) + "\n")
        assert run(requests, output, engine)[0] == 0
        assert submitted(engine) == 1
    assert len(answers(output)) == 53


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    requests, output = write_requests(tmp_path / "in", 20), tmp_path / "out"
    with FakeEngine(tmp_path / "e") as engine:
        assert run(requests, output, engine)[0] == 0
        before = output.read_bytes()
        write_requests(requests, 20, temperature=0.5)
        code, _, errors = run(requests, output, engine)
        assert code == 2 and "answers another request" in errors and "--overwrite" in errors
    write_requests(requests, 20)
    with FakeEngine(tmp_path / "e2", fingerprint="1" * 16) as other:
        code, _, errors = run(requests, output, other)
        assert code == 2 and "the model or the dtype has changed" in errors
        assert output.read_bytes() == before
        assert run(requests, output, other, "--overwrite")[0] == 0
        assert len(answers(output)) == 22


def test_a_file_of_something_else_is_not_touched(tmp_path: Path) -> None:
    requests, output = write_requests(tmp_path / "in", 5), tmp_path / "out"
    output.write_text('{"name": "mine"}\n')
    with FakeEngine(tmp_path / "e") as engine:
        code, _, errors = run(requests, output, engine)
    assert code == 2 and "out, line 1 is not a result row of run-batch" in errors
    assert output.read_text() == '{"name": "mine"}\n'


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    requests, output = write_requests(tmp_path / "in", 50), tmp_path / "out"
    with FakeEngine(tmp_path / "e", hold=True) as engine:
        first = start(requests, output, engine)
        engine.next_of(Submit)
        code, _, errors = run(requests, output, engine)
        assert code == 2 and "is being written by another run" in errors
        engine.release()
        first.communicate(timeout=60)
        assert first.returncode == 0
    assert len(answers(output)) == 52


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no small disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_waited_for(tmp_path: Path, small_disk: Path) -> None:
    requests, output = write_requests(tmp_path / "in", 1500), small_disk / "out"
    with FakeEngine(tmp_path / "e", window=64) as engine:
        assert run(requests, tmp_path / "undisturbed", engine)[0] == 0
        program = start(requests, output, engine)
        assert program.stderr is not None
        lines = []
        while "waiting for room" not in "".join(lines):
            lines.append(program.stderr.readline())
            assert program.poll() is None, lines
        assert answers(output), "whole rows only"
        subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
        _, errors = program.communicate(timeout=60)
        assert program.returncode == 0 and "there is room again" in errors
        assert answers(output) == answers(tmp_path / "undisturbed")


def test_a_full_disk_can_be_interrupted(tmp_path: Path, small_disk: Path) -> None:
    requests, output = write_requests(tmp_path / "in", 1500), small_disk / "out"
    with FakeEngine(tmp_path / "e", window=64) as engine:
        program = start(requests, output, engine)
        assert program.stderr is not None
        while "waiting for room" not in program.stderr.readline():
            assert program.poll() is None
        program.send_signal(signal.SIGTERM)  # SIGINT is ignored where the tests run in the background
        program.communicate(timeout=30)
        assert program.returncode == 143
        assert answers(output), "whole rows only"


def test_shards_are_put_together(tmp_path: Path) -> None:
    """Their outputs one behind the other are the output of the whole file, and a run of that has nothing to do."""
    requests, count = write_requests(tmp_path / "in", 200), 3
    outputs = [tmp_path / f"out-{number}" for number in range(count)]
    with FakeEngine(tmp_path / "e", window=32) as engine:
        assert run(requests, tmp_path / "whole", engine)[0] == 0
        submitted(engine)
        before = num_lines(outputs[1])
        program = start(requests, outputs[1], engine, "--shard", "1/3")
        while num_lines(outputs[1]) < before + 20 and program.poll() is None:
            time.sleep(0.001)
        program.kill()
        program.communicate()
        for number, output in enumerate(outputs):
            code, text, errors = run(requests, output, engine, "--shard", f"{number}/{count}")
            assert code == 0, errors
            expected = len(range(number, 202, count))
            assert f"done: {expected} requests" in text
            assert num_lines(output) == expected
        together = tmp_path / "together"
        together.write_bytes(b"".join(output.read_bytes() for output in outputs))
        assert answers(together) == answers(tmp_path / "whole")
        submitted(engine)
        code, _, errors = run(requests, together, engine)
        assert code == 0 and "nothing to do: every line of the input has its row" in errors
        assert submitted(engine) == 0
        code, _, errors = run(requests, tmp_path / "none", engine, "--shard", "3/3")
        assert code == 2 and "the shards of 3 are 0/3 to 2/3" in errors

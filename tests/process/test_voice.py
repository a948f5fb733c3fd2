"""Commands on a terminal, in a pipe, quiet, and for programs."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.process.test_run_batch import WITH_FAKE_COORDINATOR, run, runtime_base, write_requests

pytestmark = pytest.mark.timeout(60)
__all__ = ["runtime_base"]  # a fixture


def on_terminal(*args: str | Path, stop_at: str | None = None, term: str = "xterm-256color") -> tuple[int, str]:
    """(exit code, all that a terminal of 100 columns gets); SIGTERM is sent when `stop_at` appears."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": "100", "LINES": "40"}
    command = [sys.executable, "-c", WITH_FAKE_COORDINATOR, "serves", *map(str, args)]
    program = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown, deadline, stopped = b"", time.monotonic() + 40, False
    while time.monotonic() < deadline:
        if select.select([master], [], [], 0.1)[0]:
            try:
                shown += os.read(master, 1 << 16)
            except OSError:  # the other end is closed
                break
        if stop_at is not None and not stopped and stop_at.encode() in shown:
            program.send_signal(signal.SIGTERM)
            stopped = True
    os.close(master)
    return program.wait(20), shown.decode()


def test_a_batch_on_a_terminal(tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in", [f"prompt {n}" for n in range(500)])
    code, shown = on_terminal("run-batch", "-i", requests, "-o", tmp_path / "out", "--model", "m")
    assert code == 0
    assert "500 of 500 done" in shown and "compute" in shown and "█" in shown and "memory" in shown
    assert "weights: 1.0 GiB" in shown and "done: 500 requests (0 failed)" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1, "the cursor is shown again"
    assert "Traceback" not in shown


def test_the_summary_goes_where_standard_output_goes(tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in", ["a"])
    master, slave = pty.openpty()
    command = [sys.executable, "-c", WITH_FAKE_COORDINATOR, "serves", "run-batch", "-i", str(requests)]
    environment = {**os.environ, "TERM": "xterm"}
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out"), "--model", "m"], stdout=subprocess.PIPE, stderr=slave, env=environment
    )
    os.close(slave)
    os.close(master)
    assert done.returncode == 0 and done.stdout.startswith(b"done: 1 requests") and b"\x1b" not in done.stdout


def test_without_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    requests = write_requests(tmp_path / "in", ["a"])
    code, shown = on_terminal("run-batch", "-i", requests, "-o", tmp_path / "out", "--model", "m")
    assert code == 0
    assert not re.search(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", shown), "no foreground colour"


def test_a_terminal_that_can_do_nothing_gets_lines(tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in", ["a"])
    code, shown = on_terminal("run-batch", "-i", requests, "-o", tmp_path / "out", "--model", "m", term="dumb")
    assert code == 0 and "\x1b" not in shown and "1 of 1 requests" in shown


def test_launch_on_a_terminal_until_it_is_stopped() -> None:
    code, shown = on_terminal("launch", "--model", "m", stop_at="0 running")
    assert code == 0
    assert "endpoint: ipc://" in shown and "stopped" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1


def test_quiet(tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in", ["a", "b"], model="another")
    code, output, errors = run("run-batch", "-i", requests, "-o", tmp_path / "out", "--model", "m", "--quiet")
    assert (code, output) == (0, "")
    assert errors == "a library prints this\nwarning: requests name the model 'another'; 'fake' answers them\n"


def test_for_programs(tmp_path: Path) -> None:
    requests = write_requests(tmp_path / "in", ["a", "b"], model="another")
    code, output, errors = run("run-batch", "-i", requests, "-o", tmp_path / "out", "--model", "m", "--json")
    assert code == 0
    assert errors == "a library prints this\n"
    events = [json.loads(line) for line in output.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[-1] == "done" and {"log", "plan", "progress", "warning"} <= set(kinds)
    last = events[-1]
    assert (last["done"], last["failed"], last["total"]) == (2, 0, 2)
    progress = next(event for event in events if event["event"] == "progress")
    assert progress["status"]["memory"]["budget"] == 4 << 30


def test_errors_for_programs(tmp_path: Path) -> None:
    code, output, errors = run("run-batch", "-i", tmp_path / "none", "-o", tmp_path / "out", "--model", "m", "--json")
    assert (code, errors) == (2, "")
    (event,) = [json.loads(line) for line in output.splitlines()]
    assert event["event"] == "error" and event["exit_code"] == 2 and "No such file" in event["message"]
    code, output, errors = run("run-batch", "-i", "x", "-o", "y", "--quiet", "--json")
    assert code == 2 and "--quiet and --json exclude each other" in errors


def test_status(tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", WITH_FAKE_COORDINATOR, "serves", "launch", "--model", "m", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    try:
        while (event := json.loads(program.stdout.readline()))["event"] != "ready":
            pass
        code, output, _ = run("status", "--endpoint", event["endpoint"], "--json")
        found = json.loads(output)
        assert code == 0 and found["running"] == 0 and found["lanes"]["compute"] == 0.9
        code, output, _ = run("status", "--endpoint", event["endpoint"])
        assert code == 0 and "compute" in output and "90%" in output and "\x1b" not in output
        code, shown = on_terminal("status", "--endpoint", event["endpoint"], "--watch", stop_at="compute")
        assert code == 143 and "0 waiting" in shown
    finally:
        program.terminate()
        program.wait(20)

"""Workers lost, disks full and engines killed while sequences are written to disk or read from there: the same tokens,
and nothing left."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flexgen_lite import Client, FlexGenLite, SamplingParams
from flexgen_lite.engine.zygote import SHARED
from tests.engine_processes import survivors, workers_of
from tests.fault_injection import Fault, inject, struck
from tests.tight_engine import SETTINGS, expect_short_answers, tight_engine, tokens_of
from tests.tiny_models import make_model, ragged_prompts

SAMPLED = SamplingParams(max_tokens=90, temperature=0.8, seed=3, ignore_eos=True)
PROMPTS = ragged_prompts(24, longest=40)
ROUNDS = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[list[list[int]]]]]:
    """By family: a model, and the tokens of an engine that has room for all."""
    found = {}
    for family in ("llama", "qwen3.5"):
        model = make_model(family, tmp_path_factory.mktemp(family))
        with FlexGenLite(model, **SETTINGS) as engine:
            found[family] = model, [[list(c.token_ids)] for c in engine.generate(PROMPTS, SAMPLED)]
    return found


def disk(folder: Path) -> dict[str, Any]:
    return {"kv_disk": "1GiB", "kv_disk_dir": str(folder / "kv")}


def totals(client: Client) -> dict[str, float]:
    return dict(client.status().totals)


def until_some_fail(client: Client, expected: list[list[list[int]]], others: bool) -> dict[str, float]:
    """The totals once writing or reading a sequence has failed, and `others` were written, if that is to be; mostly
    after one round."""
    for _ in range(ROUNDS):
        assert tokens_of(client, PROMPTS, SAMPLED) == expected
        found = totals(client)
        if found["kv_disk_failures"] and (found["parked_sequences"] or not others):
            break
        expect_short_answers(client)
    return found


@pytest.mark.parametrize(
    ("fault", "family"),
    [
        (Fault("park", 2), "llama"),
        (Fault("park", 3, after=True), "qwen3.5"),
        (Fault("fetch", 1), "qwen3.5"),
        (Fault("fetch", 3, "SIGSEGV", after=True), "llama"),
        (Fault("pwritev", 4), "qwen3.5"),
        (Fault("preadv of KV", 3, "exit", after=True), "llama"),
    ],
    ids=str,
)
def test_the_loader_lost_in_the_middle(
    family: str, fault: Fault, models: dict[str, Any], runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was on its way is ordered again of the next one; what is parked is still there."""
    model, expected = models[family]
    inject(monkeypatch, tmp_path / "faults", fault)
    with tight_engine(model, **disk(tmp_path), prefix_caching=False) as (_, client):
        for _ in range(ROUNDS):
            assert tokens_of(client, PROMPTS, SAMPLED) == expected
            if struck(tmp_path / "faults"):
                break
            expect_short_answers(client)
        found = totals(client)
    assert struck(tmp_path / "faults") == {0}
    assert found["restarts"] == 1 and found["kv_disk_failures"] == 0
    assert found["fetched_sequences"] == found["parked_sequences"] > 0


@pytest.mark.parametrize("family", ["llama", "qwen3.5"])
def test_other_workers_lost_while_sequences_are_parked(
    family: str, models: dict[str, Any], runtime: Path, tmp_path: Path
) -> None:
    model, expected = models[family]
    with tight_engine(model, **disk(tmp_path)) as (engine, client):
        for number, victim in enumerate(("attention worker 1", "compute worker"), start=1):
            before = totals(client)["parked_sequences"]
            job = client.submit(PROMPTS, SAMPLED)
            deadline = time.monotonic() + 60
            while totals(client)["parked_sequences"] == before and time.monotonic() < deadline:
                time.sleep(0.01)
            workers_of(engine.pid)[victim].send_signal(signal.SIGKILL)
            assert [[list(c.token_ids)] for c in job.results()] == expected
            found = totals(client)
            assert found["restarts"] == number and found["parked_sequences"] > before
            assert found["kv_disk_failures"] == 0
            expect_short_answers(client)


@pytest.mark.parametrize("times", [1, 1000])
def test_a_full_disk(
    times: int, models: dict[str, Any], runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a while, or for good: what cannot be written is computed again."""
    model, expected = models["llama"]
    inject(monkeypatch, tmp_path / "faults", Fault("pwritev", 1, "ENOSPC", times=times))
    with tight_engine(model, **disk(tmp_path), prefix_caching=False) as (_, client):
        found = until_some_fail(client, expected, others=times == 1)
    assert found["kv_disk_failures"] > 0 and found["restarts"] == 0
    assert (found["parked_sequences"] > 0) == (times == 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few pages, and without direct reads and writes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no small disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("share", [False, True])
def test_a_disk_that_is_smaller_than_was_said(
    share: bool, models: dict[str, Any], runtime: Path, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", "flexgen_lite")
    model, expected = models["llama"]
    options = {"kv_disk": "1GiB", "kv_disk_dir": str(small_disk), "prefix_caching": share}
    with tight_engine(model, **options) as (_, client):
        for _ in range(ROUNDS):
            assert tokens_of(client, PROMPTS, SAMPLED) == expected
            expect_short_answers(client)
        found = totals(client)
    assert found["kv_disk_failures"] > 0 and found["restarts"] == 0
    assert found["kv_disk_written_bytes"] > 0, "as much as has room"
    assert len(list(small_disk.iterdir())) == share


def test_a_disk_that_returns_other_bytes(
    models: dict[str, Any], runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = models["llama"]
    inject(monkeypatch, tmp_path / "faults", Fault("preadv of KV", 1, "garble", after=True, times=1000))
    with tight_engine(model, **disk(tmp_path), prefix_caching=False) as (_, client):
        found = until_some_fail(client, expected, others=True)
    assert found["kv_disk_failures"] == found["parked_sequences"] > 0 and found["fetched_sequences"] == 0


def test_requests_cancelled_while_they_are_parked(models: dict[str, Any], runtime: Path, tmp_path: Path) -> None:
    """Their slots and pages are free: the same engine serves all of them once more."""
    model, expected = models["llama"]
    with tight_engine(model, **disk(tmp_path)) as (_, client):
        for _ in range(3):
            before = totals(client)["sent_back"]
            job = client.submit(PROMPTS, SAMPLED)
            deadline = time.monotonic() + 60
            while totals(client)["sent_back"] == before and time.monotonic() < deadline:
                time.sleep(0.005)
            job.cancel()
            expect_short_answers(client)
        assert tokens_of(client, PROMPTS, SAMPLED) == expected
        assert totals(client)["parked_sequences"] > 0


def test_nothing_is_left_of_an_engine_that_is_killed(
    models: dict[str, Any], runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But the file of prefixes, which the next one goes on with."""
    model, expected = models["llama"]
    with monkeypatch.context() as alone:
        alone.delenv(SHARED)  # the workers are the engine's own children
        with tight_engine(model, **disk(tmp_path)) as (engine, client):
            client.submit(PROMPTS, SAMPLED)
            deadline = time.monotonic() + 60
            while not totals(client)["parked_sequences"] and time.monotonic() < deadline:
                time.sleep(0.01)
            processes = [psutil.Process(engine.pid), *workers_of(engine.pid).values()]
            os.kill(engine.pid, signal.SIGKILL)
            assert not survivors(processes, 30)
            (left,) = (tmp_path / "kv").iterdir()
            assert left.suffix == ".prefixes"
    with tight_engine(model, **disk(tmp_path)) as (_, client):
        assert tokens_of(client, PROMPTS, SAMPLED) == expected


def test_descriptors_and_files_after_a_run(models: dict[str, Any], runtime: Path, tmp_path: Path) -> None:
    """An engine that goes on parking has as many open files as before; its disk is empty at the end."""
    model, expected = models["llama"]
    with tight_engine(model, **disk(tmp_path), prefix_caching=False) as (engine, client):

        def open_files() -> dict[str, int]:
            found = {name: process.num_fds() for name, process in workers_of(engine.pid).items()}
            return found | {"coordinator": psutil.Process(engine.pid).num_fds()}

        assert tokens_of(client, PROMPTS, SAMPLED) == expected
        before, written = open_files(), totals(client)["kv_disk_written_bytes"]
        expect_short_answers(client)
        assert tokens_of(client, PROMPTS, SAMPLED) == expected
        assert open_files() == before and totals(client)["kv_disk_written_bytes"] > written
    assert list((tmp_path / "kv").iterdir()) == []

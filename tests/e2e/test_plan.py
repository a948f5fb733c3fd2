"""`plan` and `calibrate` as a user meets them: a tiny model is measured by real workers, once, and jobs are predicted
from that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite import Client, EngineConfig, SamplingParams
from flexgen_lite.cost.job import JobRequest
from flexgen_lite.demo import pretrained
from flexgen_lite.engine.calibration import CalibrationError
from flexgen_lite.launcher import calibrate
from flexgen_lite.launcher.forecast import Forecaster
from flexgen_lite.launcher.supervisor import EngineSupervisor
from flexgen_lite.plan.machine import inspect_machine
from flexgen_lite.plan.workload import Workload
from flexgen_lite.tokens.tokenizer import TextTokenizer
from tests.tiny_models import make_model

JOB = ("--requests", "100", "--prompt-tokens", "20", "--max-tokens", "8")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def kept(model: Path, cache: Path) -> Path:
    """The file of a calibration."""
    copy = cache / "copy.json"
    (*_, done) = events(flexgen(cache, "calibrate", "--model", model, "--ram", "1GiB", "-o", copy, "--json"))
    assert done["rates"]["segments"]
    (found,) = (cache / "flexgen-lite" / "calibrations").glob("*.json")
    assert found.read_bytes() == copy.read_bytes()
    return found


def flexgen(cache: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flexgen_lite", *map(str, arguments)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def events(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_job_is_predicted_and_the_machine_measured_once(model: Path, tmp_path: Path) -> None:
    cache = tmp_path
    told = events(flexgen(cache, "plan", "--model", model, "--ram", "1GiB", *JOB, "--json"))
    assert any("measuring how fast" in event.get("message", "") for event in told)
    assert any(event["event"] == "plan" and "LlamaForCausalLM" in event["text"] for event in told)
    first = told[-1]["predicted"]
    assert (first["requests"], first["generated_tokens"], first["prompt_tokens"]) == (100, 800, 2000)
    assert 0.01 < first["seconds"] < 600 and 0 < first["lanes"]["compute"] <= 1
    assert {one["name"] for one in told[-1]["with"]} >= {"twice the RAM", "half the RAM", "answers half as long"}
    again = events(flexgen(cache, "plan", "--model", model, "--ram", "1GiB", *JOB, "--json"))
    assert not any("measuring" in event.get("message", "") for event in again)
    assert again[-1]["predicted"]["seconds"] == pytest.approx(first["seconds"], rel=0.2)
    longer = [*JOB[:-1], "16"]
    more = events(flexgen(cache, "plan", "--model", model, "--ram", "1GiB", *longer, "--json"))
    assert more[-1]["predicted"]["seconds"] > 1.3 * first["seconds"]


def test_a_file_is_predicted_and_run_with_what_was_found(model: Path, cache: Path, kept: Path, tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    rows = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body} for i in range(30)]
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no request\n", encoding="utf-8")
    flags = ("--model", model, "--ram", "1GiB")
    found = events(flexgen(cache, "plan", *flags, "-i", requests, "--json"))[-1]["predicted"]
    assert (found["requests"], found["generated_tokens"], found["prompt_tokens"]) == (30, 180, 120)
    half = events(flexgen(cache, "plan", *flags, "-i", requests, "--answer-tokens", "3", "--json"))[-1]["predicted"]
    assert half["generated_tokens"] == 90 and half["seconds"] < found["seconds"]
    trace = tmp_path / "trace.json"
    done = flexgen(cache, "run-batch", *flags, "-i", requests, "-o", tmp_path / "out.jsonl", "--trace", trace)
    assert done.returncode == 0 and "predicted 0:0" in done.stderr
    assert "were predicted, " in done.stdout and "ottleneck" in done.stdout.splitlines()[-1]
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 31
    page = flexgen(cache, "report", trace, "-o", tmp_path / "report.html")
    assert page.returncode == 0 and "were predicted" in page.stdout
    assert "s predicted</td>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_several_engines_are_planned_together(model: Path, cache: Path, kept: Path) -> None:
    flags = ("--model", model, "--ram", "1900MiB", "--engines", "2", "--json")
    told = events(flexgen(cache, "plan", *flags))
    assert not any("measuring" in event.get("message", "") for event in told), "one engine is measured"
    (text,) = [event["text"] for event in told if event["event"] == "plan"]
    assert "engines   2, each with" in text and "of weights are there once" in text
    first, second = told[-1]["engines"]
    assert first["resident_layers"] == second["resident_layers"] == first["num_layers"]
    assert 0 < first["shared_bytes"] == second["shared_bytes"]
    planned = [sum(one["memory"].values()) for one in (first, second)]
    assert sum(planned) - first["shared_bytes"] <= (1900 - 128) << 20
    refused = flexgen(cache, "plan", *flags, "--machine", cache / "copy.json")
    assert refused.returncode == 2 and "--machine and engines=2 exclude each other" in refused.stdout
    small = flexgen(cache, "plan", "--model", model, "--ram", "200MiB", "--engines", "2")
    assert small.returncode == 2 and "2 engines" in small.stderr


def test_beginnings_in_common_are_predicted(model: Path, cache: Path, kept: Path, tmp_path: Path) -> None:
    requests = tmp_path / "in.jsonl"
    beginning = [9, 4, 7, 5] * 24
    rows = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": [*beginning, 5 + i]}}
        for i in range(30)
    ]
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = ("plan", "--model", model, "--ram", "1GiB", "-i", requests, "--json", "--set")
    apart, shared = (events(flexgen(cache, *flags, f"prefix_caching={on}"))[-1] for on in ("false", "true"))
    assert shared["predicted"]["seconds"] < apart["predicted"]["seconds"]
    assert shared["predicted"]["prompt_tokens"] == apart["predicted"]["prompt_tokens"] == 30 * 97
    (found,) = (one for one in apart["with"] if one["name"] == "prefix caching")
    assert found["seconds"] == pytest.approx(shared["predicted"]["seconds"], rel=0.3)
    assert not any(one["name"] == "prefix caching" for one in shared["with"])


def test_parking_is_predicted(model: Path, kept: Path, tmp_path: Path) -> None:
    """In a KV cache that was made for shorter sequences."""
    shorter = Workload(sequences=60, typical_tokens=48, longest_likely=48, longest_tokens=48)
    given: dict[str, Any] = {"ram": "1GiB", "max_sequences": 16, "prefix_caching": False}
    plain = EngineConfig(model=str(model), **given)
    config = EngineConfig(model=str(model), kv_disk="64MiB", kv_disk_dir=tmp_path / "kv", **given)
    requests = [JobRequest(20, 100, 100)] * 60
    forecaster = Forecaster(calibrate.read(kept), inspect_machine(), shorter, requests)
    without, found = forecaster.forecast(plain), forecaster.forecast(config)
    assert without.job is not None and found.job is not None
    assert found.setup.plan.num_pages == without.setup.plan.num_pages == 16 * 3
    assert without.job.preempted == 0 < found.job.preempted and found.job.passes < 0.8 * without.job.passes
    row = next(one for one in forecaster.variants(plain, {}, without) if one.name.startswith("KV on disk"))
    assert row.job is not None and row.job.passes == found.job.passes
    assert not any(one.name.startswith("KV on disk") for one in forecaster.variants(config, {}, found))
    params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    with EngineSupervisor(config, expected=shorter) as engine, Client(engine.endpoint) as client:
        begun = time.monotonic()
        answers = client.submit([[5 + n, *range(6, 25)] for n in range(60)], params).results()
        seconds, totals = time.monotonic() - begun, client.status().totals
    assert all(answer.error is None for answer in answers)
    assert totals["passes"] == pytest.approx(found.job.passes, rel=0.1)
    assert totals["parked_sequences"] == pytest.approx(found.job.preempted, rel=0.3)
    assert 0.2 < found.job.seconds / seconds < 5


def test_another_machine_is_predicted_from_its_file(model: Path, cache: Path, kept: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow.json"
    slow.write_text(json.dumps(slowed(json.loads(kept.read_bytes()))))
    flags = ("plan", "--model", model, "--ram", "1GiB", *JOB, "--json")
    done = flexgen(cache, *flags[:-1], "--machine", slow, "--quantization", "int8")
    assert done.returncode == 2 and "was measured with quantization=auto, not int8" in done.stderr
    here, there = (events(flexgen(cache, *flags, *more))[-1]["predicted"] for more in ((), ("--machine", slow)))
    assert there["seconds"] > 1.5 * here["seconds"], "segments are not all of it: there is what lies between them"
    slow.write_text("{}")
    done = flexgen(cache, *flags[:-1], "--machine", slow)
    assert done.returncode == 2 and "is no calibration" in done.stderr


def test_what_changed_is_measured_again(kept: Path, tmp_path: Path) -> None:
    found = calibrate.read(kept)
    assert calibrate._is_unchanged(found.opened.spec)
    file = Path(found.opened.spec.files[0])
    before = file.stat()
    os.utime(file, ns=(0, 0))
    assert not calibrate._is_unchanged(found.opened.spec)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    old = tmp_path / "old.json"
    old.write_text(json.dumps(json.loads(kept.read_bytes()) | {"version": "0.0"}))
    with pytest.raises(CalibrationError, match=r"it is of version 0\.0"):
        calibrate.read(old)


@pytest.fixture(scope="module")
def cache_of_two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model measured as it is, which is then said to be slow, and with KV in 8 bits."""
    cache = tmp_path_factory.mktemp("two")
    flags = ("plan", "--model", model, "--ram", "1GiB", *JOB, "--json", "--allow", "kv_dtype=int8")
    told = events(flexgen(cache, *flags))
    measuring = [event["message"] for event in told if "measuring" in event.get("message", "")]
    assert [text.partition(", ")[2] for text in measuring] == [
        "as configured (1 of 2): about a minute, once",
        "kv_dtype=int8 (2 of 2): about a minute, once",
    ]
    for file in (cache / "flexgen-lite" / "calibrations").glob("*.json"):
        if json.loads(file.read_bytes())["settings"]["kv_dtype"] == "auto":
            file.write_text(json.dumps(slowed(json.loads(file.read_bytes()))))
    again = events(flexgen(cache, *flags))
    assert not any("measuring" in event.get("message", "") for event in again)
    assert again[-1]["policy"]["kv_dtype"] == "int8" and again[-1]["gain"] > 1.2
    rows = {one["name"]: one.get("seconds") for one in again[-1]["with"]}
    assert rows["kv_dtype=int8"] == again[-1]["predicted"]["seconds"] < rows["as configured"]
    return cache


def slowed(calibration: dict[str, Any]) -> dict[str, Any]:
    for rate in calibration["rates"]["segments"].values():
        for name in ("prompt", "decode"):
            rate[name]["points"] = [[x, 10 * y] for x, y in rate[name]["points"]]
    return calibration


def texts(output: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in rows}


def test_what_is_allowed_is_told_of(model: Path, cache_of_two: Path) -> None:
    done = flexgen(cache_of_two, "plan", "--model", model, "--ram", "1GiB", *JOB, "--allow", "kv_dtype=int8")
    (policy,) = (line for line in done.stdout.splitlines() if line.startswith("policy"))
    assert "kv_dtype=int8" in policy and "times as fast as what the plan's rules choose" in policy
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert any(line.startswith("kv_dtype=int8 ") and line.endswith("1.00 x") for line in lines)
    assert any(line.startswith("as configured ") and line.endswith("x") for line in lines)
    assert any("not measured yet: `--allow quantization=int4` does" in line for line in lines)
    assert "KV cache" in done.stderr and "in int8" in done.stderr, "it is the plan of what was chosen"


def test_a_run_takes_what_is_allowed_and_a_resumed_one_goes_on_with_it(
    model: Path, cache_of_two: Path, tmp_path: Path
) -> None:
    requests, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": [5, 6, 7, 8], "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    rows = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body} for i in range(30)]
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ("run-batch", "--model", model, "--ram", "1GiB", "-i", requests, "-o", output)
    allow = ("--allow", "kv_dtype=int8")

    def cut() -> bytes:
        kept = b"".join(output.read_bytes().splitlines(keepends=True)[:10])
        output.write_bytes(kept)
        return kept

    done = flexgen(cache_of_two, *command, *allow)
    assert done.returncode == 0 and "policy    kv_dtype=int8" in done.stderr and "in int8" in done.stderr
    whole, kept = texts(output), cut()
    done = flexgen(cache_of_two, *command, *allow)
    assert done.returncode == 0 and "going on with kv_dtype=int8" in done.stderr and "in int8" in done.stderr
    assert output.read_bytes().startswith(kept) and texts(output) == whole
    cut()
    done = flexgen(cache_of_two, *command)
    assert done.returncode == 2 and "answers another request" in done.stderr, "the two are not mixed"

    output.unlink()
    assert flexgen(cache_of_two, *command).returncode == 0
    whole, kept = texts(output), cut()
    done = flexgen(cache_of_two, *command, *allow)
    assert done.returncode == 0 and "going on with" not in done.stderr, "rows are as configured, slow as that is"
    assert output.read_bytes().startswith(kept) and texts(output) == whole


def test_projections_go_to_the_cpu_where_that_was_measured(model: Path, tmp_path: Path) -> None:
    flags = ("plan", "--model", model, "--ram", "1GiB", "--device", "cpu", "--set", "stage_weights=true", "--json")
    flags = (*flags, *JOB)
    told = events(flexgen(tmp_path, *flags))[-1]
    (row,) = (one for one in told["with"] if one["name"] == "cpu_projections=qkv")
    assert row["problem"] == "not measured yet: `--allow cpu_projections=qkv` does" and told["policy"] == {}
    told = events(flexgen(tmp_path, *flags, "--allow", "cpu_projections=qkv"))[-1]
    names = [one["name"] for one in told["with"] if "cpu_projections" in one["name"]]
    assert names == ["cpu_projections=qkv"]
    for file in (tmp_path / "flexgen-lite" / "calibrations").glob("*.json"):
        if "cpu_projections" not in json.loads(file.read_bytes())["settings"]:
            file.write_text(json.dumps(slowed(json.loads(file.read_bytes()))))
    told = events(flexgen(tmp_path, *flags))[-1]
    assert told["policy"]["cpu_projections"] == "qkv", "auto is the better of both, once they are known"
    told = events(flexgen(tmp_path, *flags, "--set", "cpu_projections=none"))[-1]
    assert "cpu_projections" not in told["policy"], "what is given is left as it is"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ram", "10MiB", *JOB), "needs at least"),
        ((*JOB, "-i", "x.jsonl"), "--requests and -i exclude each other"),
        (("-i", "x.jsonl"), "x.jsonl"),
        (("--requests", "3", "--prompt-tokens", "100000"), "would take none of the requests"),
        (("--allow", "kv_dtype=int8"), "--allow chooses what a job would be fastest with"),
        ((*JOB, "--allow", "kv_dtype=int8", "--machine", "x.json"), "--allow and --machine exclude each other"),
        ((*JOB, "--allow", "kv_dtype=int9"), "kv_dtype='int9' is not allowed"),
    ],
)
def test_what_cannot_be_planned(model: Path, cache: Path, kept: Path, arguments: tuple[str, ...], said: str) -> None:
    done = flexgen(cache, "plan", "--model", model, *arguments)
    assert done.returncode == 2 and said in done.stderr


def test_texts_are_counted_with_the_models_tokenizer(cache: Path, tmp_path: Path) -> None:
    model = Path(pretrained.MODEL)
    requests = tmp_path / "in.jsonl"
    texts = ["record: Ravi Costa;* 24 Jul 1976;ph: +48 92 18883-24 =>", "x", "Mira vidal; October 4, 1962 =>"]
    rows = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": text, "max_tokens": 4}}
        for i, text in enumerate(texts)
    ]
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = events(flexgen(cache, "plan", "--model", model, "--ram", "1GiB", "-i", requests, "--json"))[-1]["predicted"]
    tokenizer = TextTokenizer(str(model / "tokenizer.json"))
    assert found["prompt_tokens"] == sum(len(tokenizer.encode(text, add_special_tokens=True)) for text in texts)

"""What users get wrong: a bad line is a row with an error and the job goes on; a bad launch is one clear message and
exit code 2. No traceback reaches anybody. Some go through a process of the command's own, most call what it calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flexgen_lite import FlexGenLite
from flexgen_lite.cli.main import app
from flexgen_lite.demo.pretrained import MODEL

BODY = {"prompt": "record: john", "max_tokens": 3, "temperature": 0}


def flexgen(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flexgen_lite", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def line(custom_id: Any, url: str = "/v1/completions", **body: Any) -> bytes:
    row = {"custom_id": custom_id, "method": "POST", "url": url, "body": {**BODY, **body}}
    return json.dumps(row).encode() + b"\n"


GOOD = line("good")
BAD_LINES: list[tuple[bytes, str | None, str]] = [
    (b"{\n", None, "not JSON"),
    (b"\xff\xfe{}\n", None, "not JSON"),
    (b"[" * 5000 + b"\n", None, "not JSON"),
    (b"[]\n", None, "not a JSON object"),
    (b"null\n", None, "not a JSON object"),
    (line(7), None, "custom_id is missing or not a string"),
    (GOOD, "good", "was used by an earlier line"),
    (line("method").replace(b"POST", b"GET"), "method", 'only "POST"'),
    (line("url", url="/v1/embeddings"), "url", "supported are /v1/completions"),
    (line("unknown", best_of=2), "unknown", "body.best_of: not supported"),
    (line("typed", temperature="hot"), "typed", "body.temperature='hot' is not allowed"),
    (line("true", max_tokens=True), "true", "body.max_tokens=True is not allowed"),
    (line("nan", temperature=float("nan")), "nan", "body.temperature=nan is not allowed"),
    (line("huge number").replace(b'"max_tokens": 3', b'"max_tokens": 1e400'), "huge number", "body.max_tokens=inf"),
    (line("digits").replace(b'"temperature": 0', b'"temperature": 1' + b"0" * 400), "digits", "give a finite number"),
    (line("biased", logit_bias={"5": 10**400}), "biased", "give a finite number"),
    (line("too huge", max_tokens=1 << 70), "too huge", "is not allowed"),
    (line("zero", max_tokens=0), "zero", "body.max_tokens=0 is not allowed"),
    (line("negative", max_tokens=-1), "negative", "body.max_tokens=-1 is not allowed"),
    (line("no prompt", prompt=None), "no prompt", "body.prompt is missing"),
    (line("empty", prompt=[]), "empty", "the prompt is empty"),
    (line("mixed", prompt=[1, "a"]), "mixed", 'has "a" among its token ids'),
    (line("surrogate", prompt="\ud800"), "surrogate", "not Unicode text"),
    (line("long", prompt=[5] * 256), "long", "the prompt has 256 tokens, the model takes 256"),
    (line("endless", prompt="x " * 100_000), "endless", "characters, the model takes 256 tokens"),
    (line("a book", prompt="x" * ((8 << 20) + 1)), "a book", "body.prompt has 8388609 characters, 8388608 allowed"),
    (line("outside", prompt=[288]), "outside", "token id 288 is outside the vocabulary of 288"),
    (line("below", prompt=[-1]), "below", "has -1 among its token ids"),
    (line("stop outside", stop_token_ids=[999]), "stop outside", "token id 999 is outside the vocabulary"),
    (line("bias outside", logit_bias={"999": 1}), "bias outside", "token id 999 is outside the vocabulary"),
    (line("no messages", url="/v1/chat/completions"), "no messages", "body.prompt: not supported"),
]
ODD_LINES = [line("most", max_tokens=10**15), line("nothing", prompt=""), GOOD.replace(b"good", b"crlf")[:-1] + b"\r\n"]


@pytest.mark.timeout(200)
def test_bad_lines_are_rows_with_an_error_and_the_job_goes_on(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(GOOD + b"".join(bad for bad, _, _ in BAD_LINES) + b"\n  \n" + b"".join(ODD_LINES) + line("last"))
    done = flexgen("run-batch", "-i", source, "-o", out, "--model", MODEL, "--ram", "2GiB", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert f"done: {len(BAD_LINES) + 5} requests ({len(BAD_LINES)} failed)" in done.stdout
    rows = [json.loads(row) for row in out.read_text(encoding="utf-8").splitlines()]
    good = {row["custom_id"] for row in rows if row["error"] is None}
    assert good == {"good", "most", "nothing", "crlf", "last"}
    bad = [row for row in rows if row["error"] is not None]
    assert len(bad) == len(BAD_LINES)
    for row in bad:
        assert row["response"]["status_code"] == row["error"]["code"] == 400
        assert row["error"]["type"] == "BadRequestError" and row["response"]["body"] is None
    for _, custom_id, words in BAD_LINES:
        messages = [row["error"]["message"] for row in bad if row["custom_id"] == custom_id]
        assert any(words in message for message in messages), f"{custom_id}: {words!r} is not in {messages}"


def _model(folder: Path, change: Callable[[Path], None]) -> Path:
    copy = folder / "model"
    shutil.copytree(MODEL, copy)
    change(copy)
    return copy


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


BAD_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "broken config": (lambda m: void((m / "config.json").write_text("{")), "config.json"),
    "unknown type": (lambda m: void((m / "config.json").write_text('{"model_type": "nothing"}')), "nothing"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "safetensors"),
    "half the weights": (lambda m: _truncate(m / "model.safetensors"), "model.safetensors"),
    "no weights inside": (lambda m: void((m / "model.safetensors").write_bytes(b"")), "model.safetensors"),
    "weights that are a pipe": (lambda m: _pipe(m / "model.safetensors"), "model.safetensors is a named pipe, not a"),
    "no tokenizer inside": (
        lambda m: void((m / "tokenizer.json").write_text("{}")),
        "tokenizer.json holds no tokenizer",
    ),
    "no tokenizer, and no more": (
        lambda m: _bare_tokenizer(m, "{}"),
        "tokenizer.json holds no tokenizer (Model missing",
    ),
    "a broken tokenizer, and no more": (
        lambda m: _bare_tokenizer(m, "{"),
        "tokenizer.json: its JSON cannot be read (",
    ),
    "other ends": (
        lambda m: void((m / "generation_config.json").write_text('{"eos_token_id": "x"}')),
        "eos_token_id='x'",
    ),
    "heads that do not divide": (
        lambda m: _config(m, num_attention_heads=7),
        "cannot be opened as a model (ValueError",
    ),
    "ids of another kind": (lambda m: _config(m, bos_token_id=[1]), "config.json cannot be used"),
}


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _bare_tokenizer(model: Path, text: str) -> None:
    """Which the coordinator reads as it is."""
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer.json").write_text(text)


def _config(model: Path, **values: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def void(_: object) -> None: ...


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_model_that_cannot_be_opened(name: str, refused: Refused, tmp_path: Path) -> None:
    change, words = BAD_MODELS[name]
    refused(words, "launch", "--model", _model(tmp_path, change), "--ram", "2GiB")


@pytest.mark.parametrize("name", ["no config", "half the weights", "heads that do not divide"])
def test_a_refusal_by_a_process(name: str, tmp_path: Path) -> None:
    change, words = BAD_MODELS[name]
    done = flexgen("launch", "--model", _model(tmp_path, change), "--ram", "2GiB")
    _check_refusal(words, done.returncode, done.stderr)


Refused = Callable[..., None]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Checks that a command is refused in one sentence with these words; nor does a process of the engine say more."""

    def refused(words: str, *arguments: str | Path) -> None:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert "Traceback" not in done.output
        _check_refusal(words, done.exit_code, capfd.readouterr().err + done.stderr)

    return refused


def _check_refusal(words: str, code: int, told: str) -> None:
    last = told.strip().splitlines()[-1]
    assert code == 2 and last.startswith("error: ") and words in last, told
    assert len(last) < 1000 and "Traceback" not in told
    assert sum(part.startswith("error: ") for part in told.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/such/model"], "model directory /no/such/model does not exist"),
        ([], "model is missing"),
        (["--model", "m", "--set", "layer_slot=3"], "did you mean layer_slots?"),
        (["--model", "m", "--set", "layer_slots=1"], "layer_slots=1 is not allowed"),
        (["--model", "m", "--ram", "lots"], "ram='lots' is not allowed"),
        (["--model", "m", "--ram", "-1GiB"], "ram='-1GiB' is not allowed"),
        (["--model", "m", "--dtype", "int4"], "dtype='int4' is not allowed"),
        (["--model", "m", "--config", "/no/such.yaml"], "/no/such.yaml' cannot be read"),
        (["--model", MODEL, "--ram", "100MiB"], "needs at least"),
        (["--model", MODEL, "--ram", "2GiB", "--max-model-len", "512"], "over the model's limit of 256"),
        (["--model", MODEL, "--ram", "2GiB", "--device", "cuda"], "sees no CUDA GPU"),
        (["--model", MODEL, "--ram", "2GiB", "--trace", "/no/such/dir/t.json"], "cannot be written"),
    ],
)
def test_a_launch_that_cannot_be(arguments: list[str], words: str, refused: Refused) -> None:
    if "cuda" in arguments:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    refused(words, "launch", *arguments)


@pytest.mark.parametrize("content", ["- a\n- b\n", "ram: 1GiB\nram: 2GiB\n", "ram: [\n", "42\n", "\x00\x01"])
def test_a_config_file_that_is_none(content: str, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    refused(str(path), "launch", "--model", "m", "--config", path)


def test_a_budget_that_is_too_small_says_how_much_is_needed_and_what_would_lower_it() -> None:
    done = flexgen("launch", "--model", MODEL, "--ram", "300MiB", "--set", "max_sequences=64")
    assert done.returncode == 2
    assert "needs at least" in done.stderr and "300.0 MiB allowed: raise ram" in done.stderr


def test_files_that_cannot_be(refused: Refused, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD)
    model = ("--model", MODEL, "--ram", "2GiB")
    for arguments, words in (
        (("-i", tmp_path / "none", "-o", tmp_path / "out"), "No such file"),
        (("-i", tmp_path, "-o", tmp_path / "out"), "Is a directory"),
        (("-i", source, "-o", tmp_path), "Is a directory"),
        (("-i", source, "-o", tmp_path / "none" / "out"), "is not a directory: make it first"),
        (("-i", source, "-o", source), "is the input file"),
        (("-i", source, "-o", "/proc/nothing"), "/proc/nothing"),
    ):
        refused(words, "run-batch", *arguments, *model)
    assert source.read_bytes() == GOOD


def test_a_second_engine_on_the_same_endpoint(refused: Refused, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/engine.sock"
    with FlexGenLite(MODEL, ram="2GiB", dtype="float32", endpoint=endpoint) as engine:
        refused(
            "is in use by another engine", "launch", "--model", MODEL, "--ram", "2GiB", "--set", f"endpoint={endpoint}"
        )
        assert engine.generate([5, 6]).error is None

"""The command line: what is refused, in which words, with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexgen_lite import EngineError
from flexgen_lite.cli.main import app
from flexgen_lite.config.engine import EngineConfig


def run(*args: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.output


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "hi"}}
    path.write_text(json.dumps(row) + "\n")
    return path


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[EngineConfig]:
    """The configurations of the engines that commands would have started."""
    configs: list[EngineConfig] = []
    module = types.ModuleType("flexgen_lite.cli.launch")
    module.launch_engine = lambda config, console: configs.append(config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flexgen_lite.cli.launch", module)
    return configs


def test_version_and_help() -> None:
    assert run("--version") == (0, "flexgen-lite 0.1.0\n")
    for command in ("run-batch", "launch", "demo", "status"):
        assert command in run("--help")[1]
        assert run(command, "--help")[0] == 0


def test_flags_win_over_settings_and_file(tmp_path: Path, launched: list[EngineConfig]) -> None:
    (tmp_path / "c.yaml").write_text("model: from-file\nram: 1GiB\nlayer_slots: 3\n")
    flags = [
        "--model",
        "m",
        "--dtype",
        "float32",
        "--kv-dtype",
        "int8",
        "--device",
        "cpu",
        "--ram",
        "2GiB",
        "--gpu",
        "1GiB",
    ]
    flags += ["--attention-workers", "2", "--load-format", "dummy", "--trace", "t.json", "--max-model-len", "64"]
    flags += ["--set", "layer-slots=4", "--set", "attention_cpus=[[0], [1]]", "--config", str(tmp_path / "c.yaml")]
    assert run("launch", *flags) == (0, "")
    assert launched == [
        EngineConfig(
            model="m",
            dtype="float32",
            kv_dtype="int8",
            device="cpu",
            ram="2GiB",
            gpu="1GiB",
            attention_workers=2,
            load_format="dummy",
            trace="t.json",
            max_model_len=64,
            layer_slots=4,
            attention_cpus=[[0], [1]],
        )
    ]


def test_several_engines(launched: list[EngineConfig]) -> None:
    for number in ("2", "auto"):
        assert run("launch", "--model", "m", "--engines", number) == (0, "")
    assert launched == [EngineConfig(model="m", engines=2), EngineConfig(model="m", engines="auto")]
    assert run("launch", "--model", "m", "--engines", "0")[0] == 2


def test_the_model_may_come_from_the_file(tmp_path: Path, launched: list[EngineConfig]) -> None:
    (tmp_path / "c.yaml").write_text("model: from-file\n")
    assert run("launch", "--config", tmp_path / "c.yaml", "--attention-workers", "auto")[0] == 0
    assert launched == [EngineConfig(model="from-file")]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "error: model is missing: give a model directory or a hub id"),
        (["--model", "m", "--ram", "lots"], "error: ram='lots' is not allowed: give a size such as"),
        (["--model", "m", "--dtype", "int8"], "error: dtype='int8' is not allowed"),
        (["--model", "m", "--set", "layer_slot=3"], "did you mean layer_slots?"),
        (["--model", "m", "--set", "layer_slots"], "write key=value"),
        (["--model", "m", "--config", "/no/such.yaml"], "cannot be read: No such file or directory"),
    ],
)
def test_user_errors_are_one_sentence(args: list[str], message: str, launched: list[EngineConfig]) -> None:
    code, output = run("launch", *args)
    assert code == 2
    assert message in output
    assert len(output.splitlines()) == 1
    assert launched == []


def test_unknown_options_are_usage_errors() -> None:
    code, output = run("launch", "--nonsense")
    assert code == 2
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (EngineError("the loader died"), 1, "error: the loader died\n"),
        (EngineError("no such model", user_error=True), 2, "error: no such model\n"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied\n"),
        (KeyError("bug"), 1, "error: internal failure, KeyError: 'bug'\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (KeyboardInterrupt(143), 143, "stopped\n"),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str) -> None:
    def serve(*_: object) -> None:
        raise error

    module = types.ModuleType("flexgen_lite.cli.launch")
    module.launch_engine = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flexgen_lite.cli.launch", module)
    assert run("launch", "--model", "m") == (code, message)


def test_run_batch_looks_at_the_files_first(tmp_path: Path, requests: Path) -> None:
    output = tmp_path / "out.jsonl"
    code, text = run("run-batch", "-i", tmp_path / "none", "-o", output, "--model", "m")
    assert (code, text) == (2, f"error: {tmp_path / 'none'}: No such file or directory\n")
    code, text = run("run-batch", "-i", requests, "-o", requests, "--model", "m", "--overwrite")
    assert (code, text) == (2, f"error: {requests} is the input file: give another output file\n")
    code, text = run("run-batch", "-i", requests, "-o", tmp_path / "no" / "out", "--model", "m")
    assert (code, text) == (2, f"error: {tmp_path / 'no'} is not a directory: make it first\n")
    output.write_text("earlier\n")
    code, text = run("run-batch", "-i", requests, "-o", output, "--model", "m")
    assert code == 2
    assert "line 1 is not a result row of run-batch: give another output file, or --overwrite" in text
    assert output.read_text() == "earlier\n"


def test_engine_flags_have_no_place_beside_an_endpoint(tmp_path: Path, requests: Path) -> None:
    args = ["run-batch", "-i", requests, "-o", tmp_path / "o", "--endpoint", "ipc:///x", "--ram", "1GiB"]
    code, text = run(*args, "--set", "layer_slots=3")
    assert code == 2
    assert "--set, --ram cannot change the running engine at --endpoint" in text
    code, text = run(*args[:-2], "--allow", "kv_dtype=int8")
    assert code == 2 and "--allow cannot change the running engine at --endpoint" in text


def test_no_engine_at_the_endpoint(tmp_path: Path, requests: Path) -> None:
    for args in (["status"], ["run-batch", "-i", str(requests), "-o", str(tmp_path / "o")]):
        code, text = run(*args, "--endpoint", f"ipc://{tmp_path}/none")
        assert code == 2
        assert text.startswith(f"error: no engine at ipc://{tmp_path}/none")


def test_the_demo_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    module = types.ModuleType("flexgen_lite.cli.demo")
    module.run_demo = lambda **options: calls.append(options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flexgen_lite.cli.demo", module)
    assert run("demo", "--records", "20", "--ram", "300MB") == (0, "")
    assert run("demo", "--quantization", "int4") == (0, "")
    assert calls == [
        {"records": 20, "ram": "300MB", "quantization": None},
        {"records": 300, "ram": None, "quantization": "int4"},
    ]


def loaded_by(code: str) -> set[str]:
    program = f"import sys; {code}; print('|'.join(sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return set(output.strip().split("|"))


def test_imports_stay_light() -> None:
    heavy = {"zmq", "pydantic", "torch", "transformers", "numpy", "yaml", "rich", "typer", "msgpack"}
    assert loaded_by("import flexgen_lite") & heavy == set()
    assert loaded_by("import flexgen_lite.cli.main") & (heavy - {"typer"}) == set()
    everything = "from flexgen_lite import *; import flexgen_lite.cli.run_batch, flexgen_lite.cli.launch"
    assert loaded_by(everything) & {"torch", "transformers", "numba"} == set()


def test_what_is_exported_is_there() -> None:
    import flexgen_lite

    assert {getattr(flexgen_lite, name) is not None for name in flexgen_lite.__all__} == {True}
    assert set(flexgen_lite.__all__) <= set(dir(flexgen_lite))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = flexgen_lite.nonsense


COMPLETING = "import sys; sys.argv[0] = 'flexgen-lite'; from flexgen_lite.cli.main import main; main()"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_told_how_to_complete(shell: str) -> None:
    def complete(**variables: str) -> str:
        command, told = [sys.executable, "-c", COMPLETING], {**os.environ, **variables}
        return subprocess.run(command, env=told, capture_output=True, text=True, timeout=30).stdout

    script = complete(_FLEXGEN_LITE_COMPLETE=f"source_{shell}")
    assert "flexgen-lite" in script and "_FLEXGEN_LITE_COMPLETE" in script
    asked = {"_FLEXGEN_LITE_COMPLETE": "complete_bash", "COMP_WORDS": "flexgen-lite ru", "COMP_CWORD": "1"}
    assert complete(**asked).split() == ["run-batch"]


HUGE = "x" * 100_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["HUGE"], "No such command"),
        (["--HUGE"], "No such option"),
        (["launch", "--HUGE"], "No such option"),
        (["serve", "--port", "HUGE"], "--port"),
        (["demo", "--records", "9" * 100_000], "--records"),
        (["launch", "--model", "HUGE"], "give a model directory"),
        (["launch", "--set", "HUGE"], "is not a setting"),
        (["launch", "--set", "ram=HUGE"], "above 0 and up to"),
        (["launch", "--config", "HUGE"], "File name too long"),
        (["run-batch", "-i", "HUGE", "-o", "out", "--model", "m"], "File name too long"),
        (["run-batch", "-i", "INPUT", "-o", "HUGE", "--model", "m"], "File name too long"),
        (["run-batch", "-i", "INPUT", "-o", "out", "--endpoint", "HUGE"], "is not supported: give ipc://"),
        (["run-batch", "-i", "INPUT", "-o", "out", "--model", "m", "--trace", "HUGE"], "File name too long"),
        (["status", "--endpoint", "ipc://HUGE"], "there is no such socket"),
        (["status", "--endpoint", "ipc://x", "--key-file", "HUGE"], "File name too long"),
        (["serve", "--model", "m", "--host", "HUGE"], "cannot listen on"),
        (["serve", "--model", "m", "--api-key-file", "HUGE"], "File name too long"),
        (["serve", "--model", "m", "--data-dir", "HUGE"], "File name too long"),
        (["report", "HUGE"], "File name too long"),
        (["keygen", "HUGE"], "File name too long"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)  # fmt: skip
def test_an_argument_of_a_hundred_thousand_characters_is_not_repeated(
    arguments: list[str], words: str, requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output = run(*(text.replace("HUGE", HUGE).replace("INPUT", str(requests)) for text in arguments))
    assert code == 2 and words in output
    assert len(output) < 1000, output[:1000]

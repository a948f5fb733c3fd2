"""What the machine offers, in lines for people."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flexgen_lite.cli import doctor
from flexgen_lite.cli.main import app
from flexgen_lite.plan.disk_rate import READ_BYTES, read_rate
from flexgen_lite.plan.machine import inspect_machine

SUBJECTS = ["processors", "instructions", "memory", "/dev/shm", "GPU", "disk", "auto", "versions"]


def test_every_subject_has_a_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(os.urandom((17 << 20) + 5))
    (tmp_path / "small.safetensors").write_bytes(b"x")
    result = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.output.splitlines()] == SUBJECTS
    assert "17.0 MiB of model.safetensors" in result.output
    assert f"{inspect_machine().num_threads} threads" in result.output


def test_a_reader_that_has_had_enough() -> None:
    """`flexgen-lite doctor | head -1`: no word on standard error."""
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "flexgen_lite", "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith(b"processors")
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_directory_without_weights(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--model", str(tmp_path)])
    assert result.exit_code == 2
    assert "has no .safetensors and no .gguf file" in result.output


def test_without_a_model_no_file_is_read() -> None:
    assert dict(doctor.examine())["disk"] == "not measured: give --model"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("model name\t: A\nflags\t\t: fpu avx2 avx512_bf16 fma\n", ["avx2", "fma", "avx512_bf16"]),
        ("Features\t: fp asimd bf16\n", ["asimd", "bf16"]),
        ("", []),
    ],
)
def test_instructions(tmp_path: Path, text: str, names: list[str]) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    assert doctor._instructions(path) == names


def test_the_whole_of_a_short_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * READ_BYTES + 4097))
    rate, num_bytes, _ = read_rate([path], seconds=60)
    assert num_bytes == 3 * READ_BYTES + 4097
    assert rate > 0

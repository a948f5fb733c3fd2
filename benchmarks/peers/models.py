"""Checkpoints and their conversions in the cache folder, each made once."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

from benchmarks.peers.commands import run_command
from benchmarks.peers.environments import python_of
from benchmarks.peers.room import require_room, size_of


@dataclasses.dataclass(frozen=True)
class Format:
    """Attributes:
    environment: that the converter runs in.
    module: of the converter.
    arguments: its further ones.
    share: of the source's size, that it takes on disk at most.
    source: the format that it is made from.
    """

    environment: str
    module: str
    arguments: tuple[str, ...] = ()
    share: float = 1.05
    source: str = "checkpoint"


FORMATS = {
    "ours-int8": Format("", "quantise_ours", ("int8",), 0.6),
    "ours-int4": Format("", "quantise_ours", ("int4",), 0.4),
    "openvino": Format("openvino", "convert_openvino", ("bf16",)),
    "openvino-int8": Format("openvino", "convert_openvino", ("int8",), 0.6),
    "openvino-int4": Format("openvino", "convert_openvino", ("int4",), 0.4),
    "ctranslate2-int8": Format("ctranslate2", "convert_ctranslate2", ("int8",), 0.6),
    "gguf": Format("llama-cpp", "convert_llama_cpp"),
    "gguf-q8_0": Format("llama-cpp", "quantise_llama_cpp", ("q8_0",), 0.6, "gguf"),
    "gguf-q4_0": Format("llama-cpp", "quantise_llama_cpp", ("q4_0",), 0.4, "gguf"),
}

_failures: dict[Path, str] = {}  # a conversion is not tried again


def model_path(shape: str, model_format: str, cache: Path) -> Path:
    """The folder or file of a shape in a format.

    Raises:
        RuntimeError: the conversion failed, or the disk has no room.
    """
    path = cache / "models" / f"{shape}.{model_format}"
    if path.exists():
        return path
    if path in _failures:
        raise RuntimeError(_failures[path])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    _remove(unfinished)
    try:
        if model_format == "checkpoint":
            command = [sys.executable, "-m", "benchmarks.peers.shapes", shape, str(unfinished)]
        else:
            form = FORMATS[model_format]
            source = model_path(shape, form.source, cache)
            python = str(python_of(form.environment, cache))
            require_room(path.parent, form.share * size_of(source))
            command = [python, "-m", f"benchmarks.peers.{form.module}", str(source), str(unfinished), *form.arguments]
        print(f"making {path.name} ...", flush=True)
        run_command(command)
    except RuntimeError as error:
        _remove(unfinished)
        _failures[path] = f"making {path.name} failed: {error}"
        raise RuntimeError(_failures[path]) from None
    unfinished.rename(path)
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

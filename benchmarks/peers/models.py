"""Checkpoints and their conversions in the cache folder, each made once."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from benchmarks.peers.commands import run_command
from benchmarks.peers.environments import python_of

# per format: environment, module of the converter, further arguments
FORMATS = {
    "openvino": ("openvino", "convert_openvino", ["bf16"]),
    "openvino-int8": ("openvino", "convert_openvino", ["int8"]),
    "ctranslate2-int8": ("ctranslate2", "convert_ctranslate2", ["int8"]),
    "gguf": ("llama-cpp", "convert_llama_cpp", []),
}


def model_path(shape: str, model_format: str, cache: Path) -> Path:
    """The folder or file of a shape in a format.

    Raises:
        RuntimeError: the conversion failed.
    """
    path = cache / "models" / f"{shape}.{model_format}"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    _remove(unfinished)
    print(f"making {path.name} ...", flush=True)
    if model_format == "checkpoint":
        command = [sys.executable, "-m", "benchmarks.peers.shapes", shape, str(unfinished)]
    else:
        environment, module, arguments = FORMATS[model_format]
        checkpoint = model_path(shape, "checkpoint", cache)
        python = str(python_of(environment, cache))
        command = [python, "-m", f"benchmarks.peers.{module}", str(checkpoint), str(unfinished), *arguments]
    try:
        run_command(command)
    except RuntimeError as error:
        _remove(unfinished)
        raise RuntimeError(f"making {path.name} failed: {error}") from None
    unfinished.rename(path)
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

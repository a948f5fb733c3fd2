"""A virtual environment for each peer, so that none of them decides the versions of another or of ours."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from benchmarks.peers.commands import run_command

TILE_CONFIG = Path(__file__).with_name("tile_config.h")
REQUIREMENTS = {
    "transformers": ["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0"],
    "openvino": [
        *("torch==2.13.0", "optimum-intel==2.2.0", "nncf==3.4.0"),
        *("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0"),
    ],
    "ctranslate2": ["torch==2.13.0", "transformers==5.23.0", "ctranslate2==4.8.5"],
    "llama-cpp": ["llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors==0.8.0", "ml-dtypes"],
}
# llama.cpp is compiled for this processor.
FOR_LLAMA_CPP = f"-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF -DCMAKE_CXX_FLAGS=-include{TILE_CONFIG}"
BUILD = {"llama-cpp": {"CMAKE_ARGS": FOR_LLAMA_CPP}}
# A dependency that language models do not use, and whose builds for CUDA break the import beside PyTorch for CPUs.
UNWANTED = {"openvino": ["torchvision"]}
REPORTED = (
    *("torch", "transformers", "accelerate", "openvino", "openvino-genai", "optimum-intel", "nncf"),
    *("ctranslate2", "llama-cpp-python", "gguf", "flexgen-lite", "numpy"),
)

_failures: dict[str, str] = {}  # an installation is not tried again


def python_of(name: str, cache: Path) -> Path:
    """The interpreter of a peer's environment, which is made on first use; "" is our own.

    Raises:
        RuntimeError: pip failed, now or before.
    """
    if name == "":
        return Path(sys.executable)
    if name in _failures:
        raise RuntimeError(_failures[name])
    try:
        return _installed(name, cache)
    except RuntimeError as error:
        _failures[name] = f"not installed: {error}"
        raise RuntimeError(_failures[name]) from None


def _installed(name: str, cache: Path) -> Path:
    folder = cache / "environments" / name
    done = folder / "installed.json"
    wanted = REQUIREMENTS[name]
    if not done.exists() or json.loads(done.read_text(encoding="utf-8")) != wanted:
        print(f"installing {' '.join(wanted)} ...", flush=True)
        run_command([sys.executable, "-m", "venv", str(folder)])
        variables = {"CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0))), **BUILD.get(name, {})}
        run_command([str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *wanted], variables)
        if name in UNWANTED:
            run_command([str(folder / "bin/python"), "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED[name]])
        done.write_text(json.dumps(wanted), encoding="utf-8")
    return folder / "bin/python"


def versions(python: Path) -> dict[str, str]:
    """Versions of the packages that matter in an environment."""
    code = (
        "import json, sys\nfrom importlib.metadata import distributions\n"
        "print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in distributions()}))"
    )
    found: dict[str, str] = json.loads(run_command([str(python), "-I", "-c", code]))
    return {name: found[name] for name in REPORTED if name in found}

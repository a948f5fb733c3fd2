"""The arguments of the harness' own `hf` model: which of them say nothing here, which are refused, and why.

docs/evaluation.md has the whole list.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config

_NOT_GIVEN = (None, False, "")
_PLACEMENT = "the engine places the model itself: give ram=, gpu= or device="
_OTHER_WEIGHTS = "the engine serves the weights of `pretrained` alone: merge them into a checkpoint first"
_QUANTISED = "the engine serves no quantised weights: give a checkpoint in float32, bfloat16 or float16"

WITHOUT_EFFECT = frozenset({"logits_cache"})
"""How `hf` saves work: the numbers are the same."""

REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "backend": (("default", "causal"), "the engine serves decoder-only models"),
    "softmax_dtype": ((None, "float32", "float", torch.float32), "logprobs are computed in float32"),
    "mixed_precision_dtype": (_NOT_GIVEN, "the engine computes in one type: give dtype="),
    "parallelize": (_NOT_GIVEN, _PLACEMENT),
    "max_memory_per_gpu": (_NOT_GIVEN, _PLACEMENT),
    "max_cpu_memory": (_NOT_GIVEN, _PLACEMENT),
    "offload_folder": ((*_NOT_GIVEN, "./offload"), _PLACEMENT),
    "tp_plan": (_NOT_GIVEN, _PLACEMENT),
    "peft": (_NOT_GIVEN, _OTHER_WEIGHTS),
    "delta": (_NOT_GIVEN, _OTHER_WEIGHTS),
    "autogptq": (_NOT_GIVEN, _QUANTISED),
    "gptqmodel": (_NOT_GIVEN, _QUANTISED),
    "gguf_file": (_NOT_GIVEN, _QUANTISED),
    "model": ((), "the model is named by pretrained="),
}
"""By argument: the values that ask for nothing, and why others are refused."""

_DTYPE_NAMES = {"float": "float32", "half": "float16"}


def engine_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What is for the engine's configuration, among the arguments that the model does not take itself.

    Raises:
        ValueError: `hf` would do something that the engine does not.
    """
    left = {}
    for name, value in options.items():
        if name in REFUSED:
            allowed, reason = REFUSED[name]
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is refused: {reason}")
        elif name == "dtype":
            text = str(value).removeprefix("torch.")
            left[name] = _DTYPE_NAMES.get(text, text)
        elif name not in WITHOUT_EFFECT:
            left[name] = value
    return left


def engine_device(device: str) -> str:
    """Like `hf`, the harness' default "cuda:0" means the CPU where there is no GPU."""
    return "auto" if device.startswith("cuda") and not torch.cuda.is_available() else device


def model_directory(pretrained: object, revision: object, subfolder: str) -> str:
    """Where tokenizer, configuration and weights are: a directory or a hub id. A revision is one of the hub's.

    Raises:
        ValueError: the engine cannot open that.
    """
    if not isinstance(pretrained, str | os.PathLike):
        raise ValueError(f"pretrained is a {type(pretrained).__name__}: give a model directory or a hub id")
    name = os.fspath(pretrained)
    if name.lower().endswith(".gguf"):
        raise ValueError(f"pretrained={name!r} is refused: the harness reads the tokenizer of a model directory")
    if Path(name).is_dir():
        return str(Path(name) / subfolder)
    for key, value in (("subfolder", subfolder), ("revision", revision)):
        if value not in (None, "", "main"):
            raise ValueError(
                f"{key}={value!r} is refused: the engine takes the main revision of a hub id as a whole. Download "
                "what you mean, and give the directory"
            )
    return name


def check_remote_code(trust: object, directory: str) -> None:
    """Without code of its own, a model is the same whether it is trusted or not.

    Raises:
        ValueError: the model's own code would be run.
    """
    if not trust:
        return
    config, _ = PreTrainedConfig.get_config_dict(directory)
    if "auto_map" in config or "auto_map" in get_tokenizer_config(directory):
        raise ValueError(
            f"trust_remote_code={trust!r} is refused: {directory} comes with code of its own, and the engine runs "
            "Transformers' classes alone. Leave it out if Transformers knows the model"
        )


def other_model(served: str, directory: str) -> str | None:
    """What to tell where a running engine seems to serve another model than the one that prompts are cut for."""
    if served == directory or Path(served).resolve() == Path(directory).resolve():
        return None
    return f"the engine serves {served}, pretrained is {directory}: the numbers are right only if these are the same"

"""Every argument of the harness' own model: taken, of no effect, or refused in a sentence."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from flexgen_lite.config.problems import ConfigError
from flexgen_lite.demo.pretrained import MODEL
from flexgen_lite.lm_eval.arguments import (
    REFUSED,
    WITHOUT_EFFECT,
    engine_device,
    engine_options,
    model_directory,
    other_model,
)
from flexgen_lite.lm_eval.model import FlexGenLiteLM

NOWHERE = "ipc:///tmp/nowhere.sock"
DOCS = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def parameters(cls: Any) -> set[str]:
    return {name for name, p in inspect.signature(cls.__init__).parameters.items() if p.kind != p.VAR_KEYWORD} - {
        "self"
    }


def test_every_argument_of_hf_is_known_and_documented() -> None:
    theirs = parameters(HFLM)
    assert theirs - parameters(FlexGenLiteLM) - REFUSED.keys() - WITHOUT_EFFECT == {"dtype"}
    for name in theirs | parameters(FlexGenLiteLM):
        assert f"`{name}`" in DOCS, name


def test_what_hf_does_by_default_is_accepted() -> None:
    """Named in so many words, it still asks for nothing."""
    defaults = {name: p.default for name, p in inspect.signature(HFLM.__init__).parameters.items()}
    given = {name: value for name, value in defaults.items() if name in REFUSED or name in WITHOUT_EFFECT}
    assert engine_options(given) == {}


@pytest.mark.parametrize(
    "argument",
    [
        {"backend": "seq2seq"},
        {"softmax_dtype": "bfloat16"},
        {"softmax_dtype": torch.float64},
        {"mixed_precision_dtype": "bfloat16"},
        {"parallelize": True},
        {"max_memory_per_gpu": "10GiB"},
        {"max_cpu_memory": 10},
        {"offload_folder": "/tmp/offload"},
        {"tp_plan": "auto"},
        {"peft": "adapter"},
        {"delta": "delta"},
        {"autogptq": True},
        {"autogptq": "model.safetensors"},
        {"gptqmodel": True},
        {"gguf_file": "model.gguf"},
        {"model": "other"},
        {"load_in_4bit": True},
        {"attn_implementation": "eager"},
        {"trust_remote_cod": True},
        {"ramm": "3GiB"},
    ],
)
def test_arguments_that_are_refused(argument: dict[str, Any]) -> None:
    (name,) = argument
    with pytest.raises(ValueError, match=f"{name}"):
        FlexGenLiteLM(str(MODEL), **argument)
    with pytest.raises(ValueError, match=f"{name}=.*(is refused: |configured where it was started)"):
        FlexGenLiteLM(str(MODEL), endpoint=NOWHERE, **argument)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"pretrained": 5}, "pretrained is a int: give a model directory"),
        ({"pretrained": "some/model", "revision": "v2"}, "revision='v2' is refused"),
        ({"pretrained": "some/model", "subfolder": "small"}, "subfolder='small' is refused"),
        ({"tokenizer": 5}, "tokenizer is a int: give a directory"),
        ({"chat_template_args": "a=b"}, "chat_template_args='a=b' is not allowed"),
        ({"enable_thinking": True}, "enable_thinking=True needs think_end_token"),
        ({"max_length": 64, "max_model_len": 32}, "max_length and max_model_len are the same"),
        ({"device": "mps"}, "device"),
    ],
)
def test_arguments_of_its_own_that_are_impossible(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FlexGenLiteLM(**{"pretrained": str(MODEL), **arguments})


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    """`hf` would run it; where there is none, trust changes nothing, and the engine is looked for."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    with pytest.raises(Exception, match=r"no engine answers|nowhere"):
        FlexGenLiteLM(str(model), endpoint=NOWHERE, trust_remote_code=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own"}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"trust_remote_code=True is refused: .* comes with code of its own"):
        FlexGenLiteLM(str(model), endpoint=NOWHERE, trust_remote_code=True)


def test_a_misspelt_configuration_key_is_named() -> None:
    with pytest.raises(ConfigError, match="layer_slot"):
        FlexGenLiteLM(str(MODEL), layer_slot=3)


def test_names_of_dtypes() -> None:
    for given, named in (
        ("float32", "float32"),
        ("float", "float32"),
        (torch.float32, "float32"),
        ("half", "float16"),
        (torch.bfloat16, "bfloat16"),
        ("auto", "auto"),
    ):
        assert engine_options({"dtype": given}) == {"dtype": named}
    with pytest.raises(ConfigError, match="dtype"):
        FlexGenLiteLM(str(MODEL), dtype="float64")


def test_the_harness_default_device_is_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [engine_device(name) for name in ("cuda:0", "cuda", "cpu", "mps")] == ["auto", "auto", "cpu", "mps"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine_device("cuda:1") == "cuda:1"


def test_directories(tmp_path: Path) -> None:
    assert model_directory(tmp_path, "v2", "") == str(tmp_path)
    assert model_directory(str(tmp_path), "main", "small") == str(tmp_path / "small")
    assert model_directory("some/model", "main", "") == "some/model"


def test_an_engine_that_serves_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert other_model("some/model", "some/model") is None
    assert other_model(str(tmp_path / "model"), "model") is None
    assert other_model("/elsewhere/model", "model") == (
        "the engine serves /elsewhere/model, pretrained is model: the numbers are right only if these are the same"
    )

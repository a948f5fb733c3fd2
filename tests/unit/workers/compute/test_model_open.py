"""A model directory with whatever damage: the compute worker says it in one sentence, and no exception of another kind
leaves it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, Gemma3Config

from flexgen_lite.demo.pretrained import MODEL
from flexgen_lite.memory.usage import resident_bytes
from flexgen_lite.model.checkpoint import WEIGHTS_NAME, open_checkpoint
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.quantization import Quantization
from flexgen_lite.wire.codec import Codec
from flexgen_lite.wire.worker_messages import FromCompute, ModelOpened, OpenModel
from flexgen_lite.workers.compute import model_open, trial
from flexgen_lite.workers.compute.device import open_device
from flexgen_lite.workers.compute.model_open import MODEL_FILES, OpenedModel, fingerprint, model_directory, open_model
from flexgen_lite.workers.model import builder
from flexgen_lite.workers.serve import UserError, _failure, first_line

pytestmark = pytest.mark.timeout(60)
GARBAGE = b"\x93\x00\xff\x80" * 500


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copytree(MODEL, tmp_path / "model")
    return tmp_path / "model"


def opened(model: Path, load_format: str = "auto", quantization: Quantization | None = None) -> OpenedModel:
    """And sent to the coordinator, which takes but what the messages allow."""
    (model.parent / "run").mkdir(exist_ok=True)
    order = OpenModel(str(model), load_format, "float32", "cpu", False, None, quantization=quantization)
    found = open_model(order, open_device("cpu"), str(model.parent / "run"))
    codec, tokenizer = Codec(FromCompute), found.tokenizer
    message = ModelOpened(found.spec, fingerprint(found), tokenizer.file, tokenizer.chat_template, "cpu", 0, 1)
    assert codec.decode(codec.encode(message)) == message
    return found


def refused(model: Path, *words: str) -> None:
    with pytest.raises((UserError, CheckpointError)) as caught:
        opened(model)
    message = str(caught.value)
    assert message.splitlines() == [message] and len(message) < 500, message
    for word in words:
        assert word in message


def change(**values: Any) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return write


def put(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda model: void((model / name).write_bytes(data))


def void(_: object) -> None: ...


def pipe(name: str) -> Callable[[Path], None]:
    def make(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return make


JSON_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("data", [b"", b'{"a": ', b"[1]", GARBAGE, '{"a": 1}'.encode("utf-16")])
def test_a_json_file_that_is_none(name: str, data: bytes, model: Path) -> None:
    (model / name).write_bytes(data)
    refused(model, f"{model / name}: ", "download it again")


@pytest.mark.parametrize("name", [*JSON_FILES, "model.safetensors", "merges.txt"])
def test_a_pipe_is_not_waited_for(name: str, model: Path) -> None:
    pipe(name)(model)
    refused(model, f"{model / name} is a named pipe, not a file: download it again")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda m: (m / "config.json").unlink(), "has no config.json"),
        (put("config.json", b"{}"), "config.json cannot be used (ValueError: Unrecognized model"),
        (change(model_type="x" * 100_000), "config.json cannot be used"),
        (change(model_type=[1]), "config.json cannot be used (TypeError"),
        (change(model_type="t5", is_encoder_decoder=True), "encoder-decoder"),
        (change(hidden_size="x" * 100_000), "config.json cannot be used"),
        (change(hidden_size="192"), "hidden_size"),
        (change(hidden_size=-1), "config.json: hidden_size=-1 is not allowed: a whole number from 1 to 1048576"),
        (change(hidden_size=7), "cannot be opened as a model (ValueError: embed_dim must be divisible by num_heads"),
        (change(num_hidden_layers=0), "num_hidden_layers=0 is not allowed: a whole number from 1 to 10000"),
        (change(num_hidden_layers=10**9), "num_hidden_layers=1000000000 is not allowed"),
        (change(num_attention_heads=0), "num_attention_heads=0 is not allowed"),
        (change(vocab_size=10**12), "vocab_size=1000000000000 is not allowed"),
        (change(vocab_size=7), "config.json does not belong to these weights: download both again"),
        (change(ffn_dim=10**12), "cannot be opened as a model (RuntimeError"),
        (change(ffn_dim=-1), "cannot be opened as a model (RuntimeError: Trying to create tensor with negative"),
        (change(max_position_embeddings=-1), "max_position_embeddings=-1 is not allowed"),
        (change(activation_function="none"), "cannot be opened as a model (KeyError: 'none'): check its config.json"),
        (change(dtype="nothing"), "config.json cannot be used (AttributeError"),
        (change(auto_map=5), "config.json cannot be used (TypeError"),
        (change(id2label=[1]), "config.json cannot be used (AttributeError"),
        (change(pad_token_id=10**12), "cannot be opened as a model (AssertionError: Padding_idx"),
        (change(bos_token_id=10**12), "config.json: bos_token_id=1000000000000 is not allowed: a token id is expected"),
        (change(quantization_config={"quant_method": "x" * 100_000}), "the checkpoint is quantised (xxx"),
        (put("generation_config.json", b'{"eos_token_id": "x"}'), "eos_token_id='x' is not allowed: a token id, or"),
        (put("generation_config.json", b'{"eos_token_id": [1, null]}'), "eos_token_id=[1, None] is not allowed"),
        (put("generation_config.json", b'{"eos_token_id": true}'), "eos_token_id=True is not allowed"),
        (put("tokenizer.json", b"{}"), "tokenizer.json holds no tokenizer (Model missing"),
        (put("tokenizer_config.json", b'{"tokenizer_class": 5}'), ""),
        (put("model.safetensors", b""), "model.safetensors is cut off: 0 bytes"),
        (put("model.safetensors", GARBAGE), "model.safetensors is cut off"),
        (lambda m: (m / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "holds PyTorch pickle files"),
    ],
)  # fmt: skip
def test_damage_of_each_kind(damage: Callable[[Path], None], words: str, model: Path) -> None:
    damage(model)
    if words:
        refused(model, words)
    else:  # a tokenizer that cannot be used is warned of: token ids still work
        (warning,) = opened(model).spec.warnings
        assert f"the tokenizer in {model} cannot be used (" in warning and "give prompts as token ids" in warning


def test_what_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    (tmp_path / "link").symlink_to("nowhere")
    refused(tmp_path / "model.bin", "model.bin is neither a directory nor a .gguf file: give the directory that holds")
    refused(tmp_path / "link", "link is neither a directory")
    refused(tmp_path / "none", "none does not exist")


@pytest.mark.parametrize(
    ("model", "name", "patterns", "end"),
    [
        ("some/model", "some/model", MODEL_FILES, ""),
        ("some/model:m-Q4_0.gguf", "some/model", ["m-Q4_0.gguf"], "m-Q4_0.gguf"),
        ("some/model:Q8/m-00001-of-00002.gguf", "some/model", ["Q8/m-*-of-00002.gguf"], "Q8/m-00001-of-00002.gguf"),
    ],
)
def test_models_of_the_hub(
    model: str, name: str, patterns: list[str], end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(*args: Any, **kwargs: Any) -> str:
        asked.append((*args, kwargs))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    if not end:
        with pytest.raises(UserError, match=r"some/model has no config.json: .*some/model:FILE.gguf"):
            model_directory(model)
        (tmp_path / "config.json").write_text("{}")
        asked.clear()
    assert model_directory(model) == tmp_path / end
    (args,) = asked
    assert args[0] == name and args[1]["allow_patterns"] == patterns


def test_ends_of_sequence(model: Path) -> None:
    """Of generation_config.json, where it says any."""
    for text, ids in (('{"eos_token_id": [5, 6]}', (5, 6)), ('{"eos_token_id": 7}', (7,)), ("{}", (2,))):
        (model / "generation_config.json").write_text(text)
        assert opened(model).spec.eos_token_ids == ids
    (model / "generation_config.json").unlink()
    assert opened(model).spec.eos_token_ids == (2,)


def test_the_fingerprint_tells_other_files_apart(model: Path) -> None:
    """By name and size: rows that are there are gone on with after a copy."""
    before = fingerprint(opened(model))
    os.utime(model / "model.safetensors")
    assert fingerprint(opened(model)) == before
    with (model / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    assert fingerprint(opened(model)) != before


def test_names_of_no_layer_are_told(model: Path) -> None:
    assert not opened(model, quantization=Quantization(8)).spec.warnings
    ignore = ("lm_head", "q_proj", "re:.*layers.1.*", "lm_haed", "model.layers.0.mlp", "re:layers.0.*")
    (warning,) = opened(model, quantization=Quantization(8, ignore=ignore)).spec.warnings
    assert "lm_haed, model.layers.0.mlp, re:layers.0.*: names are like model." in warning


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_of_a_config_without_one(stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of the weights, as in Transformers; without weights that of the config's part for text."""
    monkeypatch.setattr(model_open, "_bfloat16_is_fast", lambda: True)
    config = Gemma3Config(text_config={"dtype": str(stored).removeprefix("torch.")})
    config.dtype = None
    save_file({"a.x": torch.zeros(1, dtype=torch.int32), "b": torch.zeros(1, dtype=stored)}, tmp_path / WEIGHTS_NAME)
    (tmp_path / "config.json").write_text("{}")
    wanted = torch.float32 if stored == torch.float32 else torch.bfloat16
    for checkpoint in (open_checkpoint(tmp_path), None):
        assert model_open._dtype("auto", config, checkpoint, open_device("cpu")) == wanted
    config.get_text_config().dtype = torch.float64
    assert model_open._dtype("auto", config, open_checkpoint(tmp_path), open_device("cpu")) == wanted


def test_a_slow_moment_does_not_make_a_model_twice_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    config = AutoConfig.for_model("llama")
    config.dtype = torch.bfloat16
    monkeypatch.setattr(model_open, "_bfloat16_is_fast", lambda: False)
    for has_instructions, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(model_open, "PAIRS", has_instructions)
        assert model_open._dtype("auto", config, None, open_device("cpu")) == wanted


def test_a_class_that_makes_its_parameters_of_zeros_takes_no_memory_for_them() -> None:
    """Llama 4's experts."""
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_local_experts": 16, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama4_text", **sizes, vocab_size=1000, num_attention_heads=8, head_dim=128)
    before = resident_bytes()[0]
    made = builder.build(config, torch.float32)
    assert sum(p.numel() for p in made.parameters()) * 4 > 1 << 30 and resident_bytes()[0] - before < 64 << 20
    assert torch.zeros(1 << 20).sum() == 0 and torch.zeros((2, 3)).shape == (2, 3), "as it was"


def test_an_exception_that_nobody_foresaw(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("one\ntwo")

    monkeypatch.setattr(trial, "decoder_layers", fail)
    refused(model, f"{model} cannot be opened as a model (ZeroDivisionError: one): check its config.json, or download")


def test_what_is_wrong_with_files_is_a_sentence_and_a_bug_has_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    for error in (UserError("a sentence"), CheckpointError("a sentence")):
        try:
            raise error from OSError(5, "why")
        except Exception as caught:
            failed = _failure(caught)
        assert failed.user_error and failed.message == "a sentence" and "OSError" in failed.details
        assert capsys.readouterr().err == ""
    try:
        raise KeyError("a bug")
    except Exception as caught:
        failed = _failure(caught)
    assert not failed.user_error and "Traceback" in capsys.readouterr().err


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("one\ntwo")) == "one"
    assert (
        first_line(ValueError("for field 'a':\n  TypeError: expected int\nmore"))
        == "for field 'a': TypeError: expected int"
    )
    assert first_line(ValueError("")) == "ValueError"
    assert len(first_line(ValueError("x" * 100_000))) < 250

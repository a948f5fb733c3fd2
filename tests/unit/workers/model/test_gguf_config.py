"""What GGUF files say of their models: sizes, rotary scalings, tokens that end an answer, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.workers.model import gguf_config
from flexgen_lite.workers.model.builder import eos_token_ids
from flexgen_lite.workers.model.gguf_config import SPLITS, config_of_gguf
from flexgen_lite.workers.model.tokenizer import open_tokenizer
from tests.gguf_file import BF16, F16, F32, GgufFile, tokenizer_values
from tests.tiny_tokenizers import SPECIAL, TEXT, make_tokenizer

splits_text = pytest.mark.skipif(not SPLITS, reason="this Transformers is too old to split text as GGUF files want")
SIZES: dict[str, Any] = {
    "block_count": 2, "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2,
    "feed_forward_length": 96, "context_length": 128, "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 500000.0,
}  # fmt: skip


def gguf(architecture: str, own: dict[str, Any], **values: Any) -> GgufFile:
    named = {f"{architecture}.{key}": value for key, value in (SIZES | own).items() if value is not None}
    file = GgufFile({"general.architecture": architecture, **named, **values})
    file.add("token_embd.weight", BF16, np.ones((40, 64), np.float32))
    return file


def config_of(file: GgufFile, tmp_path: Path) -> Any:
    return config_of_gguf(file.write(tmp_path / "m.gguf"))


def test_sizes(tmp_path: Path) -> None:
    config = config_of(gguf("llama", {"rope.dimension_count": 16}), tmp_path)
    assert config.model_type == "llama" and config.rope_parameters == {"rope_theta": 500000.0, "rope_type": "default"}
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (64, 2, 96)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert (config.max_position_embeddings, config.vocab_size, config.tie_word_embeddings) == (128, 40, True)
    assert config.rms_norm_eps == pytest.approx(1e-6) and config.dtype == torch.bfloat16


def test_dtype(tmp_path: Path) -> None:
    for kind, dtype in ((F32, torch.float32), (F16, torch.float16), ("Q8_0", torch.bfloat16)):
        file = gguf("qwen2", {})
        file.tensors.clear()
        file.add("token_embd.weight", kind, np.ones((40, 64), np.float32))
        file.add("output.weight", F32, np.ones((40, 64), np.float32))
        config = config_of(file, tmp_path)
        assert config.dtype == dtype and not config.tie_word_embeddings


def test_experts(tmp_path: Path) -> None:
    own = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32, "attention.key_length": 24}
    config = config_of(gguf("qwen3moe", own), tmp_path)
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (4, 2, 32)
    assert config.head_dim == 24 and config.norm_topk_prob
    config = config_of(gguf("llama", {"expert_count": 4, "expert_used_count": 2}), tmp_path)
    assert (config.model_type, config.num_local_experts, config.num_experts_per_tok) == ("mixtral", 4, 2)


def test_gemma(tmp_path: Path) -> None:
    """The largest of a family scales attention otherwise."""
    own = {"attention.key_length": 32, "attention.sliding_window": 7}
    config = config_of(gguf("gemma3", own), tmp_path)
    assert (config.head_dim, config.query_pre_attn_scalar, config.sliding_window) == (32, 32, 7)
    assert config.rope_parameters["full_attention"]["rope_theta"] == 500000.0
    config = config_of(gguf("gemma2", own | {"block_count": 46, "attn_logit_softcapping": 30.0}), tmp_path)
    assert (config.query_pre_attn_scalar, config.attn_logit_softcapping) == (16, 30)


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_rotary_scaling(own: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    found = config_of(gguf("qwen2", own), tmp_path).rope_parameters
    assert {key: found.get(key) for key in wanted} == wanted


def test_llama_3s_rotary_scaling(tmp_path: Path) -> None:
    """The file has factors alone; Transformers makes the same of what is read from them."""
    plain = config_of(gguf("llama", {"attention.key_length": 128}), tmp_path)
    plain.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    scaled = ROPE_INIT_FUNCTIONS["llama3"](plain, torch.device("cpu"))[0]
    unscaled = 1 / 500000.0 ** (torch.arange(0, 128, 2) / 128)
    file = gguf("llama", {"attention.key_length": 128})
    file.add("rope_freqs.weight", F32, (unscaled / scaled).numpy().astype(np.float32))
    assert config_of(file, tmp_path).rope_parameters == plain.rope_parameters
    file.add("rope_freqs.weight", F32, np.linspace(1, 8, 64, dtype=np.float32))
    with pytest.raises(CheckpointError, match="not those of Llama 3"):
        config_of(file, tmp_path)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"block_count": None}, "llama.block_count is None"),
        ({"embedding_length": "x"}, "llama.embedding_length is 'x'"),
        ({"rope.scaling.type": "longrope"}, "'longrope' is not read"),
    ],
)
def test_what_makes_no_config(own: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=words):
        config_of(gguf("llama", own), tmp_path)


def test_tokens_that_end_an_answer(tmp_path: Path) -> None:
    for ids, wanted in (({}, ()), ({"eos": 2}, (2,)), ({"eos": 2, "eot": 3}, (2, 3)), ({"eos": 2, "eot": 2}, (2,))):
        values = {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}
        path = gguf("llama", {}, **values).write(tmp_path / "m.gguf")
        config = config_of_gguf(path)
        if ids:
            assert eos_token_ids(path, config) == wanted


@splits_text
def test_tokenizer(tmp_path: Path) -> None:
    """Byte-level, with tokens for control and a chat template."""
    make_tokenizer("bytes", "nothing", tmp_path)
    own = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    values = tokenizer_values(tmp_path, SPECIAL, template)
    run = tmp_path / "run"
    run.mkdir()
    path = gguf("qwen2", {}, **values).write(tmp_path / "m.gguf")
    found = open_tokenizer(path, str(run), config_of_gguf(path))
    assert found.warnings == () and found.file is not None
    assert found.chat_template is not None and found.chat_template.text == template
    assert found.chat_template.special_tokens["eos_token"] == "</s>"
    read = Tokenizer.from_file(found.file)
    for text in (TEXT, "naïve <|im_end|> 12 345\n\n x", ""):
        assert read.encode(text, add_special_tokens=False).ids == own.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("split", ["qwen2", "default", None])
def test_text_that_would_be_split_otherwise_is_not_read(
    split: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with Transformers 5.17."""
    monkeypatch.setattr(gguf_config, "SPLITS", ())
    make_tokenizer("bytes", "nothing", tmp_path)
    values = tokenizer_values(tmp_path, SPECIAL, "")
    del values["tokenizer.ggml.pre"]
    values |= {} if split is None else {"tokenizer.ggml.pre": split}
    path = gguf("qwen2", {}, **values).write(tmp_path / "m.gguf")
    found = open_tokenizer(path, str(tmp_path), config_of_gguf(path))
    if split != "qwen2":
        assert found.file is not None
    else:
        assert found.file is None and found.chat_template is None
        (warning,) = found.warnings
        assert "to split text as 'qwen2' takes Transformers 5.18 or newer" in warning
        assert "give prompts as token ids" in warning


@splits_text
@pytest.mark.parametrize("split", ["llama-bpe", "tekken", "qwen2", "smollm"])
def test_what_a_way_of_splitting_text_means(split: str, tmp_path: Path) -> None:
    """Llama 3 and Tekken put BOS before text where the file does not say otherwise, and look for whole words first."""
    make_tokenizer("bytes", "nothing", tmp_path)
    values = tokenizer_values(tmp_path, SPECIAL, "") | {"tokenizer.ggml.pre": split}
    begins = split in ("llama-bpe", "tekken")
    for told in (None, False, True):
        more = {} if told is None else {"tokenizer.ggml.add_bos_token": told}
        path = gguf("llama", {}, **values, **more).write(tmp_path / "m.gguf")
        found = open_tokenizer(path, str(tmp_path), config_of_gguf(path))
        assert found.file is not None
        text = Tokenizer.from_file(found.file)
        assert (text.encode("a 1234").ids[0] == 1) is (begins if told is None else told)
        assert text.model.ignore_merges is begins
        assert [warning for warning in found.warnings if "'smollm'" in warning] == list(found.warnings)
        assert bool(found.warnings) is (split == "smollm")


def test_values_as_older_and_odd_files_have_them(tmp_path: Path) -> None:
    config = config_of(gguf("phi3", {"attention.sliding_window": 0, "rope.dimension_count": 16}), tmp_path)
    assert not config.sliding_window
    config = config_of(gguf("llama", {"rope.scale_linear": 4.0}), tmp_path)
    assert config.rope_parameters == {"rope_theta": 500000.0, "rope_type": "linear", "factor": 4.0}
    config = config_of(gguf("llama", {"rope.scale_linear": 1.0, "attention.head_count_kv": [2, 2]}), tmp_path)
    assert config.rope_parameters["rope_type"] == "default" and config.num_key_value_heads == 2
    tokens = {"tokenizer.ggml.padding_token_id": 4294967295, "tokenizer.ggml.bos_token_id": 40}
    config = config_of(gguf("llama", {}, **tokens), tmp_path)
    assert config.pad_token_id is None and config.bos_token_id is None


def test_a_tokenizer_that_is_not_there_or_not_known(tmp_path: Path) -> None:
    path = gguf("llama", {}).write(tmp_path / "m.gguf")
    assert open_tokenizer(path, str(tmp_path), config_of_gguf(path)).file is None
    values = {"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": ["a", "b"]}
    path = gguf("llama", {}, **values).write(tmp_path / "m.gguf")
    found = open_tokenizer(path, str(tmp_path), config_of_gguf(path))
    (warning,) = found.warnings
    assert found.file is None and "m.gguf cannot be used (" in warning and "give prompts as token ids" in warning

"""What a GGUF file says of its model, as Transformers' config and tokenizer.

Transformers' own reading of these files leaves sizes and rotary scalings out, and takes seconds for a large vocabulary;
its tokenizer is used as it is.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig, TokenizersBackend
from transformers.integrations.gguf import gguf_tokenizer_mapping
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from flexgen_lite.model.files import open_file, read
from flexgen_lite.model.formats.gguf import GgufModel, open_gguf
from flexgen_lite.model.formats.gguf_header import GgufTensor
from flexgen_lite.model.formats.gguf_names import SIZES
from flexgen_lite.text.shown import shown
from flexgen_lite.workers.serve import UserError, first_line

_NEEDED = ("block_count", "embedding_length", "attention.head_count")
_TOKENS = {"bos_token_id": "bos_token_id", "padding_token_id": "pad_token_id"}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
"""Ways of splitting text whose tokenizers put BOS before it, and look for a whole word before they merge its parts.
Source: llama.cpp's llama-vocab.cpp."""
_LIKE_GPT2 = ("default", "gpt-2", "gpt2", "mpt", "olmo", "jais", "trillion")  # likewise
SPLITS = tuple(getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", ()))  # that Transformers knows
_SPLITS_VERSION = "5.18"  # of Transformers, which split all texts as GPT-2's before
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the models whose attention is scaled by hidden_size / heads


def config_of_gguf(path: Path) -> PreTrainedConfig:
    """
    Raises:
        CheckpointError: the file is damaged, or its architecture is none that is read.
        UserError: its values make no config.
    """
    model = open_gguf(path)
    values = {"model_type": model.architecture.model_type, **_values(model)}
    try:
        config: PreTrainedConfig = AutoConfig.for_model(**values)
    except Exception as error:  # of many kinds: a config class takes what it is given
        raise UserError(
            f"{path}: its values make no config ({type(error).__name__}: {first_line(error)}): download it again"
        ) from error
    return config


def tokenizer_of_gguf(path: Path, config: PreTrainedConfig) -> Any:
    """Transformers' tokenizer; None where the file has none. Raises whatever Transformers raises, and UserError where
    that would split text otherwise."""
    first = open_gguf(path).headers[0]
    kind, split = first.values.get("tokenizer.ggml.model", "none"), first.values.get("tokenizer.ggml.pre", "default")
    if kind == "none" or not first.values.get("tokenizer.ggml.tokens"):
        return None
    if kind == "gpt2" and split not in _LIKE_GPT2 and not SPLITS:
        raise UserError(
            f"to split text as {shown(split)} takes Transformers {_SPLITS_VERSION} or newer, here is "
            f"{transformers.__version__}"
        )
    begins = {"add_bos_token": True} if kind == "gpt2" and split in _WHOLE_WORDS else {}  # if the file does not say
    cls = TOKENIZER_MAPPING.get(type(config), None) or TokenizersBackend
    with tempfile.TemporaryDirectory() as alone:  # Transformers would take a tokenizer.json that lies beside it
        (Path(alone) / first.path.name).symlink_to(first.path.resolve())
        found: Any = cls.from_pretrained(alone, gguf_file=first.path.name, **begins)
    if begins:
        found.backend_tokenizer.model.ignore_merges = True
    return found


def warning_of_gguf(path: Path) -> str | None:
    """Where Transformers splits text otherwise than the file wants."""
    values = open_gguf(path).headers[0].values
    split = values.get("tokenizer.ggml.pre", "default")
    if values.get("tokenizer.ggml.model") != "gpt2" or split in (*_LIKE_GPT2, *SPLITS):
        return None
    return (
        f"{path}: how its tokenizer splits text ({shown(split)}) is not known, so it is done as GPT-2's does: some "
        "text may become other tokens than the model was trained with; if that matters, get the safetensors repository"
    )


def _values(model: GgufModel) -> dict[str, Any]:
    architecture = model.architecture
    for key in _NEEDED:
        if type(model.value(key)) is not int:
            raise model.error(f"{model.name}.{key} is {shown(model.value(key))}: download it again")
    found: dict[str, Any] = dict(architecture.fixed)
    for key, name in {**SIZES, **architecture.sizes}.items():
        value = model.value(key)
        if value is not None:
            found[name] = value
    if found.get("sliding_window") == 0:  # there is none
        del found["sliding_window"]
    if model.value("expert_count") and architecture.with_experts:
        found["model_type"] = architecture.with_experts
    tensors = {tensor.name: tensor for _, tensor in model.tensors()}
    heads, hidden = model.value("attention.head_count"), model.value("embedding_length")
    width = model.value("attention.key_length") or hidden // max(heads, 1)
    if "attention.key_length" not in architecture.sizes and width != hidden // max(heads, 1):
        raise model.error(f"its heads have {width} items, {hidden // max(heads, 1)} expected: get the safetensors")
    if "head_dim" not in found and "attention.key_length" in architecture.sizes:
        found["head_dim"] = model.value("rope.dimension_count", width)
    if model.name in _LARGEST:
        is_largest = model.value("block_count") == _LARGEST[model.name]
        found["query_pre_attn_scalar"] = hidden // heads if is_largest else found["head_dim"]
    if model.name == "llama" and any(name.endswith(".attn_q.bias") for name in tensors):
        found["attention_bias"] = True
    if "token_embd.weight" in tensors:
        found["vocab_size"] = tensors["token_embd.weight"].shape[0]
    found["tie_word_embeddings"] = "output.weight" not in tensors
    found["dtype"] = _dtype(tensors.values())
    return found | _tokens(model, found.get("vocab_size")) | _rope(model, tensors, width)


def _tokens(model: GgufModel, vocab_size: int | None) -> dict[str, Any]:
    """Special tokens; both that end an answer: of the text, and of a turn."""
    found = {name: _token(model, key, vocab_size) for key, name in _TOKENS.items()}
    ends = (_token(model, f"{key}_token_id", vocab_size) for key in ("eos", "eot"))
    eos = list(dict.fromkeys(end for end in ends if end is not None))
    return {**found, "eos_token_id": eos[0] if len(eos) == 1 else eos or None}


def _token(model: GgufModel, key: str, vocab_size: int | None) -> int | None:
    """None where there is none, or one that is not in the vocabulary."""
    found = model.values.get(f"tokenizer.ggml.{key}")
    is_token = type(found) is int and found >= 0 and (vocab_size is None or found < vocab_size)
    return found if is_token else None


def _dtype(tensors: Any) -> torch.dtype:
    """That of the weights; of those in few bits bfloat16."""
    types = {tensor.type.name for tensor in tensors}
    if types <= {"F32"}:
        return torch.float32
    return torch.float16 if types <= {"F32", "F16"} else torch.bfloat16


def _rope(model: GgufModel, tensors: dict[str, GgufTensor], head_dim: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (theta := model.value("rope.freq_base")) is not None:
        found["rope_theta"] = theta
    kind, factor = model.value("rope.scaling.type", "none"), model.value("rope.scaling.factor")
    if factor is None and kind == "none" and (linear := model.value("rope.scale_linear")) not in (None, 0, 1):
        kind, factor = "linear", linear  # as it was written in 2023
    original = model.value("rope.scaling.original_context_length")
    if model.name == "phi3":
        return found | _rope_of_phi3(model, tensors, head_dim, original)
    if "rope_freqs.weight" in tensors:
        factors = list(_floats(model, "rope_freqs.weight"))
        scaling = {"rope_type": "llama3", "factor": max(factors), **_LLAMA3}
        wanted = llama3_factors(found.get("rope_theta", 10000.0), 2 * len(factors), scaling)
        if any(abs(a / b - 1) > 1e-3 for a, b in zip(factors, wanted, strict=True)):
            raise model.error("its rope_freqs are not those of Llama 3: get the model's safetensors repository instead")
        found["rope_scaling"] = scaling
    elif kind == "linear" and factor:
        found["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn" and factor:
        scaling = {"rope_type": "yarn", "factor": factor}
        found["rope_scaling"] = scaling | ({"original_max_position_embeddings": original} if original else {})
    elif kind not in ("none", "linear", "yarn"):
        raise model.error(f"its rope.scaling.type {shown(kind)} is not read: get the safetensors repository instead")
    return found


def _rope_of_phi3(
    model: GgufModel, tensors: dict[str, GgufTensor], head_dim: int, original: int | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"partial_rotary_factor": model.value("rope.dimension_count", head_dim) / head_dim}
    if "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
        found["rope_scaling"] = {
            "rope_type": "longrope",
            **{f"{kind}_factor": list(_floats(model, f"rope_factors_{kind}.weight")) for kind in ("short", "long")},
        }
        found["original_max_position_embeddings"] = original or 4096
    return found


def llama3_factors(theta: float, width: int, scaling: dict[str, Any]) -> Iterator[float]:
    """What each frequency is divided by. Source: Llama 3.1's `apply_scaling`."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    for item in range(0, width, 2):
        turns = original / (2 * torch.pi * theta ** (item / width))  # of the original context
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        yield 1 / ((1 - smooth) / factor + smooth)


def _floats(model: GgufModel, name: str) -> tuple[float, ...]:
    """Of a small tensor."""
    file, tensor = next((file, tensor) for file, tensor in model.tensors() if tensor.name == name)
    if tensor.type.name != "F32" or tensor.num_bytes > 1 << 16:
        raise model.error(f"{name} is stored as {tensor.type.name} {list(tensor.shape)}: download it again")
    path = model.headers[file].path
    with open_file(path) as stream:
        stream.seek(tensor.offset)
        return struct.unpack(f"<{tensor.num_bytes // 4}f", read(stream, path, tensor.num_bytes))

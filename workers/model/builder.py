"""Builds a Transformers language model without its weights, or refuses it in one sentence.

Parameters are on the meta device; buffers that Transformers computes in the constructor (rotary frequencies and the
like) are real. Nothing here reads a weight.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, Cache, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from flexgen_lite.model.files import is_there, read_json
from flexgen_lite.model.formats.gguf_header import is_gguf
from flexgen_lite.text.shown import shown
from flexgen_lite.workers.model.gguf_config import config_of_gguf
from flexgen_lite.workers.serve import UserError, first_line

ATTENTION_NAME = "flexgen_lite"
EXPERTS_NAME = "flexgen_lite"
ATTENTION_LAYERS = {
    "full_attention", "sliding_attention", "chunked_attention", "indexed_attention", "minimax_m3_sparse", "attention",
}  # fmt: skip
STATE_LAYERS = {"linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba", "mamba2", "mlp", "moe", "recurrent"}
STATE_VERSION = "5.24"  # of Transformers: its cache has one interface for all states
_MAX_TOKEN_ID = (1 << 31) - 1
_KNOWN_AS = {"kimi_k2": "deepseek_v3"}
"""Types that have code of their own on the hub, and are in all but name others that Transformers has."""
_LARGE_BYTES = 1 << 20
_SIZES = {  # in config.json, and the most that any model has, by far
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "vocab_size": 1 << 26,
    "max_position_embeddings": _MAX_TOKEN_ID,
}


def load_config(directory: Path) -> PreTrainedConfig:
    """The config of a model directory, or of a GGUF file. Raises UserError where there is none that can be used."""
    if is_gguf(directory):
        return config_of_gguf(directory)
    path = directory / "config.json"
    try:
        values, _ = PreTrainedConfig.get_config_dict(directory)
        if (known := _KNOWN_AS.get(str(values.get("model_type")))) is not None:
            return AutoConfig.for_model(**{**values, "model_type": known})
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # of many kinds: a config class takes what it finds in the file
        raise UserError(
            f"{path} cannot be used ({type(error).__name__}: {first_line(error)}): put it right, or download it again"
        ) from error
    return config


def config_path(directory: Path) -> Path:
    """The file that a model's config comes from."""
    return directory if is_gguf(directory) else directory / "config.json"


def check_sizes(directory: Path, config: PreTrainedConfig) -> None:
    """Raises UserError for a size that no model has, before memory is taken for it."""
    path = config_path(directory)
    for part, (name, most) in itertools.product((config, text_config(config)), _SIZES.items()):
        size = None
        with contextlib.suppress(Exception):  # classes whose layers differ refuse to tell of one for all
            size = getattr(part, name, None)
        if not isinstance(size, list | None) and not (type(size) is int and 1 <= size <= most):
            raise UserError(f"{path}: {name}={shown(size)} is not allowed: a whole number from 1 to {most} is expected")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """What a config says of the language model: a part of a multimodal model's, else all of it."""
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    return text


def language_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The Transformers class whose checkpoint `config` is of: a causal LM, or a multimodal model that has one.

    Raises UserError where our attention cannot stand in for the class's own.
    """
    kind, text = config.model_type, text_config(config)
    if config.is_encoder_decoder:
        raise UserError(f"{kind} is an encoder-decoder model; only decoder-only models can be served")
    cls = _class_of(config)
    if text is config and not getattr(config, "is_decoder", True) and _may_be_bidirectional(cls):
        raise UserError(f"{cls.__name__} is bidirectional: every token sees those behind it")
    kinds = set(getattr(text, "layer_types", None) or ())
    is_stateful = getattr(cls, "_is_stateful", False) and not (kinds and kinds <= ATTENTION_LAYERS)
    if (is_stateful or kinds - ATTENTION_LAYERS) and not hasattr(Cache, "get_recurrent_state"):
        raise UserError(
            f"{cls.__name__} keeps other state than a KV cache: that takes Transformers {STATE_VERSION} or newer, here "
            f"is {transformers.__version__}"
        )
    if other := sorted(kinds - ATTENTION_LAYERS - STATE_LAYERS):
        raise UserError(f"{cls.__name__} has layers of type {', '.join(other)}, which are not supported")
    return cls


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that the checkpoint names, if it is one for its type; else the type's own."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    if text_config(config) is not config:
        mappings = mappings[::-1]
    found = (mapping.get(config.model_type) for mapping in mappings)
    names = [one for name in found if name for one in (name if isinstance(name, tuple) else (name,))]
    if not names:
        raise UserError(f"Transformers {transformers.__version__} has no language model for {config.model_type!r}")
    named = next((name for name in config.architectures or () if name in names), names[0])
    cls: type[PreTrainedModel] = getattr(transformers, named)
    return cls


def no_interface(cls: type[PreTrainedModel]) -> str:
    return (
        f"{cls.__name__} does not call attention through Transformers' attention interface, "
        "so its attention cannot be computed outside the model"
    )


def _may_be_bidirectional(cls: type[PreTrainedModel]) -> bool:
    """BERT's family: causal only when the config says `is_decoder`."""
    return "create_bidirectional_mask" in inspect.getsource(inspect.getmodule(cls) or cls)


def build(config: PreTrainedConfig, dtype: torch.dtype, attention: str = ATTENTION_NAME) -> PreTrainedModel:
    """The model of `config` in evaluation mode: parameters on meta, buffers real, weights tied as the config says."""
    cls = language_model_class(config)
    if cls.__name__ == "Llama4ForConditionalGeneration" and not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
        MoeCausalLMOutputWithPast.image_outputs = None  # Transformers 5.24 asks its language model's output for them
    try:
        with _parameters_on_meta(), _untouched_zeros(), no_init_weights(), _without_what_needs_other_packages():
            experts = EXPERTS_NAME if attention == ATTENTION_NAME else None
            model: PreTrainedModel = cls._from_config(
                config, dtype=dtype, attn_implementation=attention, experts_implementation=experts
            )
    except KeyError as error:
        if error.args != (ATTENTION_NAME,):
            raise
        raise UserError(no_interface(cls)) from None
    model.tie_weights()
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Moves each parameter to the meta device as it is registered: its memory was never touched."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, None if param is None else nn.Parameter(param.to("meta"), requires_grad=False))

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextlib.contextmanager
def _untouched_zeros() -> Iterator[None]:
    """Has large tensors of zeros, which a class makes for its parameters, take no memory: PyTorch would write them."""
    make = torch.zeros

    def make_untouched(*size: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        dtype = dtype or torch.get_default_dtype()
        num_bytes = math.prod(shape) * dtype.itemsize
        if options or num_bytes < _LARGE_BYTES:
            return make(*size, dtype=dtype, **options)
        memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=dtype).view(*shape)

    torch.zeros = make_untouched
    try:
        yield
    finally:
        torch.zeros = make


class Absent(nn.Module):
    """In the place of a part that a package makes which is not there."""


@contextlib.contextmanager
def _without_what_needs_other_packages() -> Iterator[None]:
    """A tower that cannot be made without a package that is not there (timm) is left empty: no text goes through it."""
    make = AutoModel.from_config

    def make_if_possible(*args: Any, **kwargs: Any) -> nn.Module:
        try:
            made: nn.Module = make(*args, **kwargs)
        except ImportError:
            made = Absent()
        return made

    AutoModel.from_config = make_if_possible
    try:
        yield
    finally:
        AutoModel.from_config = make


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The part of a model that holds the decoder layers, or all of it."""
    decoder: nn.Module = model.get_decoder()
    has_list = any(isinstance(module, nn.ModuleList) for module in decoder.modules())
    return decoder if has_list else model  # ModernBERT calls its head so


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers. Raises UserError where there is not exactly one."""
    decoder = decoder_of(model)
    lists = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = [m for name, m in lists.items() if not any(name.startswith(other + ".") for other in lists)]
    if len(outer) > 1:
        count = text_config(model.config).num_hidden_layers
        outer = [m for m in outer if len(m) == count]
    if len(outer) > 1:
        outer = [m for m in outer if any("attn" in n or "attention" in n for n, _ in m.named_modules())]
    if len(outer) != 1:
        raise UserError(f"{type(decoder).__name__} has {len(outer)} lists of modules that may be its layers")
    return outer[0]


def max_length(config: PreTrainedConfig, has_indexers: bool = False) -> tuple[int, str | None]:
    """Most positions of a sequence, and a warning where that is less than the model's own limit.

    Args:
        config: of the language model.
        has_indexers: its tokens see those that an indexer chooses: all, up to as many as it chooses.

    Raises:
        UserError: how many it chooses is not known.

    With "longrope" and "dynamic" rotary embeddings Transformers changes the frequencies of the whole batch once one
    sequence is longer than the original context; up to there, every sequence is independent of its neighbours.
    """
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 20
    scaling: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {scaling.get("rope_type")} | {v.get("rope_type") for v in scaling.values() if isinstance(v, dict)}
    original = scaling.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    chosen = _most_chosen(config) if has_indexers else limit
    if chosen < limit:
        return chosen, (
            f"sequences are limited to {chosen} of {limit} tokens: beyond, {config.model_type} attends to tokens that "
            "an indexer chooses, which is not supported"
        )
    if kinds & {"longrope", "dynamic"} and original and original < limit:
        return original, (
            f"sequences are limited to {original} of {limit} tokens: "
            f"beyond, {config.model_type}'s rotary embedding depends on the other sequences of a batch"
        )
    return limit, None


def _most_chosen(config: PreTrainedConfig) -> int:
    """Tokens that an indexer chooses."""
    values = config.to_dict()
    blocks, size = values.get("index_topk_blocks"), values.get("index_block_size")
    most: int | None = values.get("index_topk") or (blocks * size if blocks and size else None)
    if most is None:
        raise UserError(f"{config.model_type} has an indexer that chooses tokens, and its config does not say how many")
    return most


def eos_token_ids(directory: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """End-of-sequence ids from generation_config.json where there is one, else from the config or its part for text.

    Raises:
        CheckpointError: generation_config.json has no JSON object.
        UserError: they are no token ids.
    """
    path, eos = config_path(directory), _token_id(config, "eos_token_id")
    if is_there(other := directory / "generation_config.json"):
        given = read_json(other).get("eos_token_id")
        path, eos = (path, eos) if given is None else (other, given)
    ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    if not all(type(token) is int and abs(token) <= _MAX_TOKEN_ID for token in ids):
        raise UserError(f"{path}: eos_token_id={shown(eos)} is not allowed: a token id, or a list of them, is expected")
    return ids


def bos_token_id(directory: Path, config: PreTrainedConfig) -> int | None:
    """Raises UserError where it is none."""
    bos = _token_id(config, "bos_token_id")
    if bos is not None and not (type(bos) is int and abs(bos) <= _MAX_TOKEN_ID):
        raise UserError(f"{config_path(directory)}: bos_token_id={shown(bos)} is not allowed: a token id is expected")
    return bos


def _token_id(config: PreTrainedConfig, name: str) -> Any:
    found = getattr(config, name, None)
    return getattr(text_config(config), name, None) if found is None else found

"""A model's config with its sizes shrunk and its character kept: norms, activations, ratio of heads, and a layer of
each kind that the model has."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

HEADS = 4
SIZES = {
    "vocab_size": 128, "hidden_size": 64, "n_embd": 64, "d_model": 64, "embed_dim": 64, "emb_dim": 64,
    "word_embed_proj_dim": 64, "num_attention_heads": HEADS, "n_head": HEADS, "n_heads": HEADS, "num_heads": HEADS,
    "attention_heads": HEADS,
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "moe_intermediate_size": 32, "intermediate_size_mlp": 96,
    "shared_expert_intermediate_size": 32, "mlp_hidden_size": 96,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "zero_expert_num": 2, "n_group": 1, "topk_group": 1,
    "q_lora_rank": 32, "kv_lora_rank": 16, "sliding_window": 8, "max_position_embeddings": 256, "n_positions": 256,
    "attention_dropout": 0.0, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 16, "laurel_rank": 16,
    "floor_scale": 4, "max_seq_len": 256, "attention_chunk_size": 8, "state_size": 16, "ssm_state_size": 16,
    "mamba_d_state": 16, "chunk_size": 8, "mamba_chunk_size": 8, "block_size": 8, "linear_head_dim": 16,
    "linear_num_heads": 4, "num_experts_per_token": 2, "num_expert_group": 1, "lru_width": 64,
    "attention_window_size": 8,
}  # fmt: skip
"""The sizes of heads stay: other numbers of a config have to fit them."""
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "embed_dim", "emb_dim", "word_embed_proj_dim", "lru_width")
_OUTPUT_WIDTHS = (
    "out_hidden_size",
    "output_dim",
    "text_hidden_size",
    "llm_hidden_size",
    "adapter_out_dim",
)  # of towers
_ADAPTERS = ("adaptor", "adapter", "projector", "connector")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "layers")
_KINDS = ("layer_types", "layers_block_type")
_FIRST_LAYERS = ("first_k_dense_replace",)  # so many at the beginning are different
_LAST_LAYERS = ("num_kv_shared_layers",)  # and at the end
_SOURCES = "kv_source_layers"  # of each layer, the one whose keys and values it reads
_LEAST_LAYERS = 2
_INNER = {  # heads of a state and their size: the inner width, which is `expand` times the model's
    "mamba_num_heads": "mamba_head_dim", "mamba_n_heads": "mamba_d_head", "n_mamba_heads": "mamba_headdim",
    "num_heads": "head_dim",
}  # fmt: skip
_PER_TOKEN = ("per_tok", "per_token")  # experts
_EXPAND = ("expand", "mamba_expand")
_GROUPS = ("n_groups", "mamba_n_groups", "mamba_ngroups")  # of these heads
_INNER_HEAD = 16  # their size


def tiny_config(config: PreTrainedConfig, keeps_vocabulary: bool = False, of_each_kind: int = 1) -> PreTrainedConfig:
    """
    Args:
        keeps_vocabulary: for classes that check ids of special tokens.
        of_each_kind: layers; for classes that tie their weights to each other.
    """
    values = copy.deepcopy(config.to_dict())
    text = values
    text_config = config.get_text_config(decoder=True)
    for name in _path(config, text_config) or ():
        text = text[name]
    sizes = {key: size for key, size in SIZES.items() if not (keeps_vocabulary and key == "vocab_size")}
    before = _width(text)
    _shrink(text, sizes, text_config, of_each_kind)
    if text is not values:
        _follow(values, text, before, _width(text))
    values["dtype"] = text["dtype"] = "float32"
    return type(config).from_dict(values)


def _path(config: PreTrainedConfig, part: PreTrainedConfig) -> tuple[str, ...] | None:
    """The names that lead from a config to a part of it."""
    if config is part:
        return ()
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig) and (path := _path(value, part)) is not None:
            return name, *path
    return None


def _follow(values: dict[str, Any], text: dict[str, Any], before: int, after: int) -> None:
    """Has the other parts of a config give what is as wide as the text's hidden states."""
    for name, part in values.items():
        if isinstance(part, dict) and part is not text:
            is_adapter = name.startswith(_ADAPTERS)
            for key in (*_OUTPUT_WIDTHS, *(_WIDTHS if is_adapter else ())):
                if part.get(key) == before:
                    part[key] = after
            _follow(part, text, before, after)


def _width(values: Mapping[str, Any]) -> int:
    width: int = next(values[name] for name in _WIDTHS if isinstance(values.get(name), int))
    return width


def _shrink(values: dict[str, Any], sizes: Mapping[str, float], config: PreTrainedConfig, of_each_kind: int) -> None:
    """`values` are the config's."""
    count = next((values[name] for name in _COUNTS if isinstance(values.get(name), int)), config.num_hidden_layers)
    derived = [getattr(config, name, None) for name in _KINDS if name not in values]
    layers = _some_of_each_kind(
        values, count, [kinds for kinds in derived if _is_per_layer(kinds, count)], of_each_kind
    )
    for key, value in values.items():
        if key == _SOURCES and _is_per_layer(value, count):
            values[key] = [layers.index(value[layer]) for layer in layers]
        elif _is_per_layer(value, count):
            values[key] = [_small(sizes, key, value[layer]) for layer in layers]
        elif _is_of_layers(key, value, count):
            values[key] = [new for new, layer in enumerate(layers) if layer in value]
    for key in _FIRST_LAYERS:
        if isinstance(values.get(key), int):
            values[key] = sum(layer < values[key] for layer in layers)
    for key in _LAST_LAYERS:
        if isinstance(values.get(key), int):
            values[key] = sum(layer >= count - values[key] for layer in layers)
    overrides = _overrides(values)
    if overrides:
        values["per_layer_config"] = {
            str(new): {
                key: _kv_heads(overrides[layer]) if key == "num_key_value_heads" else _small(sizes, key, value)
                for key, value in overrides[layer].items()
            }
            for new, layer in enumerate(layers)
            if layer in overrides
        }
    for key in _COUNTS:
        if isinstance(values.get(key), int):
            values[key] = values[key] * len(layers) // count
    heads, width = next((values[name] for name in _HEADS if isinstance(values.get(name), int)), HEADS), _width(values)
    kv_heads, head_dim = values.get("num_key_value_heads"), values.get("head_dim") or width // heads
    for key, value in values.items():
        values[key] = _small(sizes, key, value)
    if "head_dim" in values:
        values["head_dim"] = head_dim
    if width == heads * head_dim and "qk_rope_head_dim" not in values:
        values.update((key, HEADS * head_dim) for key in _WIDTHS if key in values)
    if kv_heads is not None:
        values["num_key_value_heads"] = HEADS if kv_heads == heads else 1 if kv_heads == 1 else 2
    _shrink_inner(values, width)
    for number, key in enumerate(("pad_token_id", "bos_token_id", "eos_token_id")):
        values[key] = number


def _shrink_inner(values: dict[str, Any], width: int) -> None:
    """Heads of states, which are as many as the inner width holds.

    Args:
        width: of the model, before.
    """
    if "attention_hidden_size" in values:
        values["attention_hidden_size"] = values["attention_hidden_size"] * _width(values) // width
    expand = next((values[name] for name in _EXPAND if isinstance(values.get(name), int | float)), None)
    if expand is None:
        return
    inner = int(expand * _width(values))
    if isinstance(values.get("mamba_d_ssm"), int):
        values["mamba_d_ssm"] = inner
    size = math.gcd(inner, _INNER_HEAD)
    heads = next((key for key, other in _INNER.items() if isinstance(values.get(other), int) and key in values), None)
    if heads is not None and (heads != "num_heads" or "state_size" in values):
        values[heads], values[_INNER[heads]] = inner // size, size
        values.update((key, math.gcd(values[key], inner // size, 2)) for key in _GROUPS if key in values)


def _some_of_each_kind(values: Mapping[str, Any], count: int, derived: list[Any], of_each_kind: int) -> list[int]:
    """The first layers of each kind, two layers at least; all up to the last of these where their kinds are `derived`
    of other values."""
    per_layer = [value for key, value in values.items() if _is_per_layer(value, count) and key != _SOURCES]
    per_layer += derived
    sources = values.get(_SOURCES) or range(count)
    of_layers = [value for key, value in values.items() if _is_of_layers(key, value, count)]
    first = [values[key] for key in _FIRST_LAYERS if isinstance(values.get(key), int)]
    last = [values[key] for key in _LAST_LAYERS if isinstance(values.get(key), int)]
    overrides = _overrides(values)

    def kind(layer: int) -> str:
        listed = [value[layer] for value in per_layer] + [layer in value for value in of_layers]
        listed += [sources[layer] == layer]
        placed = [layer < number for number in first] + [layer >= count - number for number in last]
        return repr((listed, placed, overrides.get(layer)))

    kinds: dict[str, list[int]] = defaultdict(list)
    for layer in range(count):
        kinds[kind(layer)].append(layer)
    first_ones = [layer for layers in kinds.values() for layer in layers[:of_each_kind]]
    chosen = {*first_ones, *(sources[layer] for layer in first_ones)}
    if derived:
        return list(range(min(count, max(_LEAST_LAYERS, *(layer + 1 for layer in chosen)))))
    rest = [layer for layer in range(count) if layer not in chosen and sources[layer] == layer]
    return sorted([*chosen, *rest[: max(0, _LEAST_LAYERS - len(chosen))]])


def _is_per_layer(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count


def _is_of_layers(key: str, value: object, count: int) -> bool:
    """Whether it lists some layers by their numbers."""
    named = key.endswith(("layers", "layer_ids", "indices", "idxs", "idx"))
    return named and isinstance(value, list) and all(type(item) is int and 0 <= item < count for item in value)


def _overrides(values: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    return {int(layer): found for layer, found in (values.get("per_layer_config") or {}).items()}


def _kv_heads(values: Mapping[str, Any]) -> int:
    """Of a layer with settings of its own."""
    return HEADS if values["num_key_value_heads"] == values.get("num_attention_heads") else 1


def _small(sizes: Mapping[str, float], key: str, value: Any) -> Any:
    known = key in sizes and isinstance(value, int | float) and not isinstance(value, bool)
    if known and key.endswith(_PER_TOKEN):  # some classes take one alone
        return min(sizes[key], value)
    return sizes[key] if known else value

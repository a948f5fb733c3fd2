"""A tiny config has a layer of each kind that the model has, and the sizes of its heads."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from flexgen_lite.workers.compute.tiny_config import tiny_config


def tiny(kind: str, **values: Any) -> Any:
    return tiny_config(AutoConfig.for_model(kind, **values)).get_text_config(decoder=True)


def test_sizes_are_small_and_heads_as_they_are() -> None:
    config = tiny("qwen3", hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, head_dim=128)
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim) == (2, 64, 128)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    config = tiny("opt", hidden_size=768, num_attention_heads=12)
    assert config.hidden_size // config.num_attention_heads == 64


@pytest.mark.parametrize(
    ("kind", "values", "lists"),
    [
        ("gemma3_text", {}, {"layer_types": ["full_attention", "sliding_attention"]}),
        ("smollm3", {}, {"no_rope_layers": [0, 1]}),
        ("gemma3", {}, {"layer_types": ["full_attention", "sliding_attention"]}),
        ("mllama", {}, {"cross_attention_layers": [1]}),
    ],
)
def test_each_kind_of_layer_survives(kind: str, values: dict[str, Any], lists: dict[str, Any]) -> None:
    config = tiny(kind, **values)
    assert {name: sorted(set(getattr(config, name))) for name in lists} == lists


def test_layers_with_settings_of_their_own() -> None:
    config = tiny("gemma4_text", attention_k_eq_v=True, num_global_key_value_heads=2)
    heads = [(one.head_dim, one.num_key_value_heads) for one in config.per_layer_config]
    assert config.layer_types == ["sliding_attention", "full_attention"] and heads == [(256, 2), (512, 1)]


def test_layers_that_share_keys_and_values() -> None:
    """Of each kind one that has its own, and one that reads another's."""
    config = tiny("gemma3n_text")
    own = config.layer_types[: config.num_hidden_layers - config.num_kv_shared_layers]
    assert config.num_kv_shared_layers == 2 and set(own) == {"sliding_attention", "full_attention"}


def test_what_a_tower_gives_is_as_wide_as_the_text_takes() -> None:
    config = tiny_config(AutoConfig.for_model("qwen3_vl", vision_config={"out_hidden_size": 4096}))
    assert config.vision_config.out_hidden_size == config.text_config.hidden_size == 512


def test_the_language_model_of_a_part() -> None:
    config = tiny_config(AutoConfig.for_model("qwen2_5_omni"))
    assert config.get_text_config(decoder=True) is config.thinker_config.text_config
    assert config.thinker_config.text_config.num_hidden_layers == 2 < config.talker_config.num_hidden_layers


def test_the_first_layers_are_dense() -> None:
    config = tiny("deepseek_v3", first_k_dense_replace=3, num_hidden_layers=61)
    assert (config.num_hidden_layers, config.first_k_dense_replace) == (2, 1)


def test_the_first_half_of_a_layer_that_calls_twice() -> None:
    config = tiny("longcat_flash")
    assert config.num_hidden_layers == 2 * config.num_layers


@pytest.mark.parametrize(("kind", "name", "count"), [("jamba", "attention", 5), ("recurrent_gemma", "sliding", 3)])
def test_kinds_of_layers_that_follow_from_other_values(kind: str, name: str, count: int) -> None:
    config = tiny(kind)
    assert config.num_hidden_layers == count and name in config.layers_block_type[-1]


@pytest.mark.parametrize(
    ("kind", "heads", "size", "expand"),
    [
        ("mamba2", "num_heads", "head_dim", "expand"),
        ("bamba", "mamba_n_heads", "mamba_d_head", "mamba_expand"),
        ("nemotron_h", "mamba_num_heads", "mamba_head_dim", "expand"),
        ("zamba2", "n_mamba_heads", "mamba_headdim", "mamba_expand"),
    ],
)
def test_heads_of_states_fill_the_inner_width(kind: str, heads: str, size: str, expand: str) -> None:
    config = tiny(kind)
    assert getattr(config, heads) * getattr(config, size) == getattr(config, expand) * config.hidden_size
    assert getattr(config, size) == 16

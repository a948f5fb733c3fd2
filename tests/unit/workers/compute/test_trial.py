"""What a text needs of a model, and what of it stays unread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from flexgen_lite.model.spec import STATE_ALIGNMENT
from flexgen_lite.wire.worker_messages import OpenModel
from flexgen_lite.workers.compute import attention_call, experts
from flexgen_lite.workers.compute.device import open_device
from flexgen_lite.workers.compute.model_open import OpenedModel, open_model
from flexgen_lite.workers.compute.trial import TextPath, find_text_path
from flexgen_lite.workers.model import builder
from flexgen_lite.workers.serve import UserError
from tests.tiny_models import FAMILIES, INDEXED, MLA, MOE, SHAPE, make_model


def path_of(kind: str, **sizes: object) -> tuple[TextPath, set[str]]:
    """And the names of the tensors that the model has left."""
    attention_call.register()
    experts.register()
    model = builder.build(AutoConfig.for_model(kind, **sizes), torch.float32)
    return find_text_path(model), set(model.state_dict())


def family(name: str) -> tuple[TextPath, set[str]]:
    kind, sizes = FAMILIES[name]
    return path_of(kind, **({} if "text_config" in sizes else SHAPE) | sizes)


def test_one_call_in_each_layer() -> None:
    path, _ = family("llama")
    assert path.columns == (0, 1, 2, 3) and len(path.layers) == len(path.attention) == 4 and not path.unused


@pytest.mark.parametrize(("name", "layers"), [("diffllama-two-calls", 4), ("longcat-two-calls", 2)])
def test_two_calls_in_each_layer(name: str, layers: int) -> None:
    path, _ = family(name)
    assert path.columns == tuple(layer for layer in range(layers) for _ in range(2))
    assert len(path.layers) == layers and len(path.attention) == 2 * layers


@pytest.mark.parametrize("name", ["gemma3-wrapper", "gemma4-wrapper", "qwen3-vl-wrapper"])
def test_towers_are_not_needed(name: str) -> None:
    path, left = family(name)
    assert path.unused and left and path.unused.isdisjoint(left)
    words = ("vision_tower.", "multi_modal_projector.", "visual.", "embed_vision.")
    assert all(any(word in tensor for word in words) for tensor in path.unused)
    assert all("language_model." in tensor or tensor.startswith("lm_head.") for tensor in left)


def test_what_a_class_calls_its_decoder_may_be_its_head() -> None:
    path, left = path_of("modernbert-decoder", num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    assert len(path.layers) == 2 and not path.unused and any("layers.1." in name for name in left)


def test_bytes_of_a_token() -> None:
    """Qwen3's: residual, normed and rotated queries, keys and values at least; an MLP's inner rows besides."""
    heads, width, inner = SHAPE["num_attention_heads"], SHAPE["hidden_size"], 1024
    path, _ = path_of("qwen3", **SHAPE | {"head_dim": 32, "num_key_value_heads": 2, "intermediate_size": inner})
    assert 4 * (width + (heads + 2 * 2) * 32) <= path.held_bytes <= 4 * (4 * width + 4 * (heads + 2 * 2) * 32)
    assert 4 * (width + 2 * inner) <= path.pass_bytes <= 4 * (6 * width + 4 * inner)


def test_what_a_token_brings_along_for_all_layers_is_counted() -> None:
    """Gemma 4's embeddings for each layer."""
    (path, _), (other, _) = (
        path_of("gemma4_text", **SHAPE | {"num_hidden_layers": layers, "hidden_size_per_layer_input": 128})
        for layers in (6, 12)
    )
    assert other.held_bytes - path.held_bytes >= 6 * 128 * 4


def test_layers_that_look_at_images_are_not_entered() -> None:
    path, left = family("mllama-wrapper")
    assert len(path.layers) == 4 and path.columns == (0, 1, 2, 3)
    assert {name.split(".")[3] for name in left if ".layers." in name} == {"0", "2", "3", "5"}


def test_layers_of_several_shapes_have_calls_of_several_shapes() -> None:
    path, _ = family("gemma4-wrapper")
    assert [(spec.head_dim, spec.num_kv_heads, spec.sliding_window) for spec in path.attention] == [
        (16, 2, 7), (16, 2, 7), (32, 1, None)
    ] * 2  # fmt: skip


@pytest.mark.parametrize("name", ["gemma4-shared-kv", "gemma3n-shared-kv"])
def test_layers_that_read_anothers_keys_and_values(name: str) -> None:
    path, _ = family(name)
    assert path.kv_columns == (0, 1, 2, 1, 2, 1)


def test_two_calls_with_keys_alike_and_values_that_differ() -> None:
    path, _ = family("diffllama-two-calls")
    assert path.kv_columns == tuple(range(8))


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v32-indexed", "longcat-two-calls"])
def test_latents_are_kept_instead_of_keys_and_values(name: str) -> None:
    path, _ = family(name)
    assert {(spec.num_heads, spec.num_kv_heads, spec.kv_width) for spec in path.attention} == {(4, 1, 16 + 8)}
    assert all(spec.values_in_keys and (spec.head_dim, spec.value_dim) == (24, 16) for spec in path.attention)


@pytest.mark.parametrize("kind", ["glm_moe_dsa", "hy_v4"])
def test_layers_that_give_more_than_hidden_states(kind: str) -> None:
    """The indexer's choice, from layer to layer, of which several are alike."""
    path, _ = path_of(kind, **SHAPE | MLA | MOE | INDEXED | {"num_hidden_layers": 6})
    assert len(path.layers) == 6 and path.has_indexers


def test_what_an_indexer_chooses_is_the_limit() -> None:
    config = AutoConfig.for_model("deepseek_v32", **SHAPE | MLA | INDEXED | {"max_position_embeddings": 4096})
    limit, warning = builder.max_length(config, has_indexers=True)
    assert limit == 128 and warning is not None and "sequences are limited to 128 of 4096 tokens" in warning
    assert builder.max_length(config, has_indexers=False) == (4096, None)
    with pytest.raises(UserError, match="does not say how many"):
        builder.max_length(AutoConfig.for_model("llama"), has_indexers=True)


def test_without_latents_all_heads_are_kept() -> None:
    kind, sizes = FAMILIES["deepseek-v3"]
    path = find_text_path(builder.build(AutoConfig.for_model(kind, **SHAPE | sizes), torch.float32), False)
    assert {(spec.num_kv_heads, spec.head_dim, spec.value_dim) for spec in path.attention} == {(4, 24, 12)}


def test_chunks_are_of_the_layers_that_say_so() -> None:
    path, _ = family("llama4-chunks")
    assert [spec.attention_chunk for spec in path.attention] == [24, 24, None, 24]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("bloom", "BloomForCausalLM does not call attention through Transformers' attention interface"),
        ("falcon", "FalconForCausalLM does not call attention through Transformers' attention interface"),
        ("blip-2", "Blip2ForConditionalGeneration cannot be run on text alone .*pixel_values"),
        ("rwkv", "RwkvForCausalLM keeps other state than a KV cache"),
        ("xlstm", "xLSTMForCausalLM keeps other state than a KV cache"),
        ("bert", "BertLMHeadModel is bidirectional"),
        ("t5", "t5 is an encoder-decoder model"),
        ("siglip", "has no language model for 'siglip'"),
    ],
)
def test_what_cannot_be_served(kind: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        path_of(kind)


def test_a_version_of_transformers_without_one_interface_for_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "Cache", object)
    for kind, name in (("mamba2", "Mamba2"), ("qwen3_5_text", "Qwen3_5"), ("jamba", "Jamba")):
        with pytest.raises(UserError, match=f"{name}ForCausalLM keeps other state .* takes Transformers 5.24 or newer"):
            path_of(kind)


@pytest.mark.parametrize(
    ("name", "columns", "stops", "kinds"),
    [
        ("qwen3.5", (0, 1, 2), (0, 2), ["conv", "recurrent"] * 2),
        ("lfm2", (0, 1, 2), (0, 1), ["conv"] * 2),
        ("kimi-linear", (0, 1, 2), (0, 2), ["conv", "recurrent"] * 2),
        ("nemotron-h", (0, 1, 2, 3, 4, 5), (0, 1, 3, 4, 5), ["conv", "recurrent"] * 2),
        ("falcon-h1", (0, 0, 1, 1, 2, 2), (0, 2, 4), ["conv", "recurrent"] * 3),
        ("mamba2", (0, 1, 2), (0, 1, 2), ["conv", "recurrent"] * 3),
    ],
)
def test_columns_of_layers_with_states(
    name: str, columns: tuple[int, ...], stops: tuple[int, ...], kinds: list[str]
) -> None:
    """Of layers with neither attention nor state as well: each has one. Keys and values are not of stops."""
    path, _ = family(name)
    assert (path.columns, path.stops) == (columns, stops)
    assert [state.kind for state in path.states] == kinds
    own = {column for column, kv in enumerate(path.kv_columns) if kv == column}
    assert own == set(range(len(columns))) - set(stops) or len(stops) == len(columns)


def test_states_do_not_overlap() -> None:
    path, _ = family("kimi-linear")
    end = 0
    for state in path.states:
        assert state.offset % STATE_ALIGNMENT == 0 and end <= state.offset < end + STATE_ALIGNMENT
        end = state.offset + state.num_bytes


def opened(directory: Path) -> OpenedModel:
    return open_model(OpenModel(str(directory), "auto", "float32", "cpu", False, None), open_device("cpu"), "/nowhere")


@pytest.mark.parametrize("name", ["gemma3-wrapper", "mllama-wrapper"])
def test_nothing_of_the_rest_is_read_and_nothing_is_said_of_it(name: str, tmp_path: Path) -> None:
    found = opened(make_model(name, tmp_path))
    assert found.spec.warnings == ()
    names = [tensor.name for unit in found.spec.units for tensor in unit.tensors]
    assert len(names) == len(set(names)) and not any("vision" in name or "cross_attn" in name for name in names)
    assert found.spec.num_parameters == sum(tensor.num_bytes // 4 for u in found.spec.units for tensor in u.tensors)
    assert (found.spec.vocab_size, found.spec.hidden_size, found.spec.max_length) == (160, 64, 128)
    assert found.spec.eos_token_ids == (2,) and found.spec.bos_token_id == 1


def test_mixers_that_begin_with_a_whole_prompt_take_memory_for_each_token() -> None:
    """MiniMax's lightning attention: queries, keys and values besides."""
    linear = SHAPE | FAMILIES["minimax"][1] | {"layer_types": ["linear_attention"] * 3}
    path, _ = path_of("minimax", **linear)
    other, _ = path_of("minimax", **linear | {"head_dim": 512})
    assert other.mix_bytes == path.mix_bytes == 0
    assert other.pass_bytes - path.pass_bytes > 4 * 3 * 4 * (512 - 16)

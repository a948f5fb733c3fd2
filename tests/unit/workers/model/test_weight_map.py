"""Every weight of a saved model, loaded through units and slots, is what from_pretrained loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from flexgen_lite.model.checkpoint import CheckpointError, open_checkpoint
from flexgen_lite.workers.model.weight_map import Binding, map_weights
from tests.meta_model import build_on_meta, decoder_layers
from tests.weights_roundtrip import assert_same_weights, attach_message, load_model, load_units

SMALL: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA: dict[str, Any] = dict(SMALL, intermediate_size=48, num_key_value_heads=2)
CONFIGS: dict[str, PretrainedConfig] = {
    "opt": OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32),
    "llama": LlamaConfig(**LLAMA),
    "llama-tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**LLAMA, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**LLAMA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    "gpt2": GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "deepseek_v3": DeepseekV3Config(
        **dict(LLAMA, num_key_value_heads=4),
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt_oss": GptOssConfig(**LLAMA, num_local_experts=4, head_dim=8),
    "phi3": Phi3Config(**LLAMA, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
}


def save_random(config: PretrainedConfig, directory: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """A model whose every tensor, norms and buffers too, is random."""
    torch.manual_seed(7)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_()
    model.save_pretrained(directory, **options)
    return model


def from_pretrained(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model


def rewrite(directory: Path, change: Any) -> None:
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", CONFIGS)
def test_same_as_from_pretrained(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_random(CONFIGS[family], tmp_path, torch.float16)
    model, units, warnings = load_model(tmp_path, dtype)
    assert_same_weights(model, from_pretrained(tmp_path, dtype))
    assert not warnings
    assert len(units) == 3
    assert sum(len(unit.tensors) for unit in units) == len({id(p) for p in model.state_dict(keep_vars=True).values()})


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "phi3", "gpt_neox"])
def test_same_dtype_is_read_straight_into_the_slot(family: str, tmp_path: Path) -> None:
    save_random(CONFIGS[family], tmp_path, torch.bfloat16)
    _, units, _ = load_model(tmp_path, torch.bfloat16)
    assert all(not unit.converted for unit in units)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_experts_are_stored_one_by_one(family: str, tmp_path: Path) -> None:
    save_random(CONFIGS[family], tmp_path, torch.bfloat16)
    _, units, _ = load_model(tmp_path, torch.bfloat16)
    joined = [tensor for tensor in units[1].tensors if len(tensor.pieces) > 1]
    assert sorted(len(tensor.pieces) for tensor in joined) == [4, 8]


@pytest.mark.parametrize("family", ["opt", "qwen3_moe"])
def test_sharded(family: str, tmp_path: Path) -> None:
    save_random(CONFIGS[family], tmp_path, torch.float32, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    model, _, _ = load_model(tmp_path, torch.float32)
    assert_same_weights(model, from_pretrained(tmp_path, torch.float32))


@pytest.mark.parametrize("family", ["opt", "llama", "mixtral", "gpt2"])
def test_base_model_names(family: str, tmp_path: Path) -> None:
    """A checkpoint of the model without its head has names without the base model's prefix."""
    model = save_random(CONFIGS[family], tmp_path, torch.float32)
    prefix = model.base_model_prefix + "."

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    rewrite(tmp_path, strip)
    loaded, _, _ = load_model(tmp_path, torch.float32)
    assert_same_weights(loaded, from_pretrained(tmp_path, torch.float32))


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_both_stored(equal: bool, tmp_path: Path) -> None:
    save_random(CONFIGS["opt"], tmp_path, torch.float32)

    def add_head(tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors["model.decoder.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.clone() if equal else embedding + 1

    rewrite(tmp_path, add_head)
    model, units, _ = load_model(tmp_path, torch.float32)
    assert_same_weights(model, from_pretrained(tmp_path, torch.float32))
    assert sum("embed_tokens" in t.name or "lm_head" in t.name for t in units[-1].tensors) == (1 if equal else 2)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied is equal


def test_tied_weight_stored_under_the_other_name(tmp_path: Path) -> None:
    save_random(CONFIGS["llama-tied"], tmp_path, torch.float32)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    rewrite(tmp_path, rename)
    model, units, _ = load_model(tmp_path, torch.float32)
    assert_same_weights(model, from_pretrained(tmp_path, torch.float32))
    assert "lm_head.weight" in {tensor.name for tensor in units[-1].tensors}


def test_kept_in_float32(tmp_path: Path) -> None:
    save_random(CONFIGS["deepseek_v3"], tmp_path, torch.bfloat16)
    _, units, _ = load_model(tmp_path, torch.bfloat16)
    kept = [tensor.name for unit in units for tensor in unit.tensors if tensor.dtype == "float32"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert set(kept) == {name for name, tensor in theirs.items() if tensor.dtype == torch.float32}
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in kept


def test_unexpected_tensors_are_one_warning(tmp_path: Path) -> None:
    save_random(CONFIGS["llama"], tmp_path, torch.float32)
    rewrite(tmp_path, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(3) for i in range(5)}))
    _, _, warnings = load_model(tmp_path, torch.float32)
    assert len(warnings) == 1
    assert "5 tensors" in warnings[0] and "extra.0" in warnings[0]


def test_old_rotary_buffers_are_no_warning(tmp_path: Path) -> None:
    save_random(CONFIGS["llama"], tmp_path, torch.float32)
    rewrite(
        tmp_path,
        lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}),
    )
    assert load_model(tmp_path, torch.float32)[2] == ()


def test_missing_tensor(tmp_path: Path) -> None:
    save_random(CONFIGS["llama"], tmp_path, torch.float32)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight .*model\.safetensors"):
        load_model(tmp_path, torch.float32)


def test_missing_expert(tmp_path: Path) -> None:
    save_random(CONFIGS["qwen3_moe"], tmp_path, torch.float32)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.down_proj.weight"))
    with pytest.raises(CheckpointError, match=r"down_proj has shape \[3, 32, 16\].*\[4, 32, 16\]"):
        load_model(tmp_path, torch.float32)


def test_wrong_shape(tmp_path: Path) -> None:
    save_random(CONFIGS["llama"], tmp_path, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dict(config, intermediate_size=56)))
    with pytest.raises(CheckpointError, match=r"\[32, 48\] in the checkpoint and \[32, 56\] in the model"):
        load_model(tmp_path, torch.float32)


def test_wrong_kind_of_number(tmp_path: Path) -> None:
    save_random(CONFIGS["llama"], tmp_path, torch.float32)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 32, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match="int32 and the model wants float32"):
        load_model(tmp_path, torch.float32)


def test_model_built_in_another_dtype() -> None:
    model = build_on_meta(CONFIGS["llama"], torch.float32)
    with pytest.raises(ValueError, match="built in"):
        map_weights(model, decoder_layers(model), None, torch.bfloat16)


@pytest.mark.parametrize("family", CONFIGS)
def test_dummy_weights(family: str) -> None:
    """Without a checkpoint every tensor is filled, always alike, and the model computes finite numbers."""
    outputs = []
    for _ in range(2):
        model = build_on_meta(CONFIGS[family], torch.bfloat16)
        layers = decoder_layers(model)
        units, warnings = map_weights(model, layers, None, torch.bfloat16)
        assert not warnings
        assert all(unit.converted == tuple(range(len(unit.tensors))) and not unit.extents for unit in units)
        attach = attach_message(units, (), "dummy")
        arena = load_units(attach)
        binding = Binding(model, layers, units)
        for index, offset in enumerate(attach.slot_offsets):
            binding.bind(index, torch.frombuffer(arena, dtype=torch.uint8)[offset:])
        with torch.no_grad():
            outputs.append(model(torch.arange(8)[None]).logits)
    assert outputs[0].isfinite().all()
    assert torch.equal(outputs[0], outputs[1])


def test_binding_again_moves_the_layer(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", **LLAMA)
    model = build_on_meta(config, torch.float32)
    layers = decoder_layers(model)
    units, _ = map_weights(model, layers, None, torch.float32)
    binding = Binding(model, layers, units)
    buffers = [torch.zeros(units[0].num_bytes, dtype=torch.uint8) for _ in range(2)]
    for buffer in (*buffers, buffers[0]):
        binding.bind(0, buffer)
        start, end = buffer.data_ptr(), buffer.data_ptr() + buffer.numel()
        assert all(start <= parameter.data_ptr() < end for parameter in layers[0].parameters())
        assert not any(parameter.requires_grad for parameter in layers[0].parameters())
    assert all(parameter.is_meta for parameter in layers[1].parameters())


def test_open_checkpoint_is_what_safetensors_reads(tmp_path: Path) -> None:
    save_random(CONFIGS["gpt2"], tmp_path, torch.float16)
    checkpoint = open_checkpoint(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    assert checkpoint.tensors.keys() == expected.keys()
    contents = (tmp_path / "model.safetensors").read_bytes()
    for name, stored in checkpoint.tensors.items():
        data = contents[stored.offset : stored.offset + stored.num_bytes]
        assert data == expected[name].numpy().tobytes()
        assert (stored.shape, stored.dtype) == (tuple(expected[name].shape), "float16")

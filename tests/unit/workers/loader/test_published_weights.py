"""Every published format, in the families that are published in it: what is loaded is what the format says, exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from flexgen_lite.model.files import CheckpointError
from tests.loaded_weights import spec_of, unpacked_weights
from tests.published.checkpoint import base_model, publish
from tests.published.formats import FORMATS, FOUR, ONLY_FOR, pairs_of

OTHERS = [
    (name, family)
    for name in ("fp8-blocks", "gptq-4bit-asym-v1", "awq", "bnb-nf4-double", "ct-nvfp4", "torchao-Int4Tensor")
    for family in ("opt", "mixtral")
]
EXPECTED_WARNINGS = ("the checkpoint is meant for activations in few bits",)
OF_LATENTS = ["fp8-blocks", "awq", "bnb-nf4-double", "ct-nvfp4", "ct-mxfp8", "gptq-4bit-asym-v1"]
ON_ALL_LAYERS = [name for name in FORMATS if name != "fbgemm" and (name not in ONLY_FOR or "desc-act" in name)]
ALL = [*pairs_of(["llama", "qwen3-moe"]), *OTHERS, *((name, "deepseek-v3") for name in OF_LATENTS)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: base_model(family, tmp_path_factory.mktemp(family), num_hidden_layers=2)
        for family in {family for _, family in ALL}
    } | {"routed": base_model("qwen3-moe", tmp_path_factory.mktemp("routed"), num_hidden_layers=2, num_experts=32)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For tensors so small, others would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "family"), ALL)
def test_weights(name: str, family: str, models: dict[str, Path], tmp_path: Path) -> None:
    exact = publish(models[family], tmp_path / "model", FORMATS[name])
    expected = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32).state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        spec = spec_of(tmp_path / "model", dtype=str(dtype).removeprefix("torch."))
        assert any(tensor.packing for unit in spec.units for tensor in unit.tensors)
        found = unpacked_weights(spec)
        assert found.keys() <= expected.keys()
        wrong = [n for n, tensor in found.items() if not torch.equal(tensor.to(dtype), expected[n].to(dtype))]
        assert not wrong
        assert not [w for w in spec.warnings if not w.startswith(EXPECTED_WARNINGS)]


def test_whole_numbers_without_a_section(models: dict[str, Path], tmp_path: Path) -> None:
    publish(models["llama"], tmp_path / "model", FORMATS["ct-int8"])
    told = spec_of(tmp_path / "model")
    edit(tmp_path / "model", lambda config: config.pop("quantization_config"))
    assert spec_of(tmp_path / "model").units == told.units


@pytest.mark.parametrize(
    "section",
    [
        {
            "quantization_status": "frozen",
            "format": "fakequant",
            "config_groups": {"a": {"targets": ["Linear"], "weights": FOUR}},
        },
        {
            "quantization_status": "frozen",
            "format": "dense",
            "config_groups": {"a": {"targets": ["Linear"], "weights": FOUR}},
        },
        {"config_groups": {}, "kv_cache_scheme": {"num_bits": 8, "type": "float"}},
        {"config_groups": {"a": {"targets": ["LlamaAttention"], "weights": None, "input_activations": FOUR}}},
    ],
)
def test_sections_of_weights_in_16_bits(section: dict[str, Any], models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["llama"], tmp_path / "model")
    edit(tmp_path / "model", lambda c: c.update(quantization_config={"quant_method": "compressed-tensors", **section}))
    spec = spec_of(tmp_path / "model")
    assert not any(tensor.packing for unit in spec.units for tensor in unit.tensors)


def test_kimi_k2_is_deepseek_v3_by_another_name(models: dict[str, Path], tmp_path: Path) -> None:
    publish(models["deepseek-v3"], tmp_path / "model", FORMATS["fp8-blocks"])
    spec = spec_of(tmp_path / "model")
    auto_map = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    edit(tmp_path / "model", lambda config: config.update(model_type="kimi_k2", auto_map=auto_map))
    assert spec_of(tmp_path / "model").units == spec.units


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes its config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ON_ALL_LAYERS)
def test_routers_and_embeddings(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Which no product alone reads: they are unpacked while they are loaded."""
    exact = publish(models["routed"], tmp_path / "model", FORMATS[name], more=r"mlp\.gate|embed_tokens")
    expected = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32).state_dict()
    for dtype in (torch.float32, torch.bfloat16)[name == "bnb-int8" :]:  # of float32 its writer rounds in another order
        found = unpacked_weights(spec_of(tmp_path / "model", dtype=str(dtype).removeprefix("torch.")))
        chosen = [n for n in found if n.endswith(("mlp.gate.weight", "embed_tokens.weight"))]
        assert len(chosen) == 3
        assert all(torch.equal(found[n], expected[n].to(dtype)) for n in chosen)


def test_scales_of_a_router_that_are_no_numbers(models: dict[str, Path], tmp_path: Path) -> None:
    publish(models["routed"], tmp_path / "model", FORMATS["awq"], more=r"mlp\.gate")
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("1.mlp.gate.scales"):
                tensor[0, 0] = float("inf")
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.gate.qweight has scales that are infinite"):
        unpacked_weights(spec_of(tmp_path / "model"))


@pytest.mark.parametrize("name", ["fp8-blocks", "awq", "gptq-8bit-desc-act"])
def test_latents_are_kept_where_their_projection_is_in_few_bits(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    publish(models["deepseek-v3"], tmp_path / "model", FORMATS[name])
    spec = spec_of(tmp_path / "model", dtype="bfloat16")
    by_name = {tensor.name: tensor for unit in spec.units for tensor in unit.tensors}
    projections = [tensor for name, tensor in by_name.items() if name.endswith("kv_b_proj.weight")]
    assert projections
    assert all(tensor.packing is None for tensor in projections)
    assert all(attention.values_in_keys for attention in spec.attention)
    assert not [warning for warning in spec.warnings if "experts.gate_up_proj" not in warning]  # of two orders there


@pytest.mark.parametrize("name", ["fp8-blocks", "fp8-blocks-ue8m0", "fp8-fp4-experts", "mxfp4"])
def test_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    """It cuts no blocks at edges where the number of scales divides that of rows."""
    family, sizes = ONLY_FOR.get(name, ["llama"])[0], {"intermediate_size": 256, "moe_intermediate_size": 128}
    model = base_model(family, tmp_path / family, num_hidden_layers=2, **sizes)
    exact = publish(model, tmp_path / name, FORMATS[name])
    config = Mxfp4Config(dequantize=True) if name == "mxfp4" else FineGrainedFP8Config(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16, quantization_config=config)
    expected = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.bfloat16)
    for (key, ours), found in zip(expected.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(found, ours), key


@pytest.mark.parametrize("name", ["mxfp4", "fp8-blocks", "bnb-nf4"])
def test_tensors_tell_the_format_where_config_json_does_not(name: str, tmp_path: Path) -> None:
    model = base_model(ONLY_FOR.get(name, ["llama"])[0], tmp_path / "base", num_hidden_layers=1)
    publish(model, tmp_path / "model", FORMATS[name])
    told = spec_of(tmp_path / "model")
    edit(tmp_path / "model", lambda config: config.pop("quantization_config"))
    untold = spec_of(tmp_path / "model")
    assert any(tensor.packing for unit in told.units for tensor in unit.tensors)
    assert untold.units == told.units

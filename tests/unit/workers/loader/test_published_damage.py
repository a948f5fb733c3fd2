"""Checkpoints in published formats that are damaged, of a kind that is not read, or asked for what they are not for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.quantization import Quantization
from flexgen_lite.workers.serve import UserError
from tests.loaded_weights import spec_of, unpacked_weights
from tests.published.checkpoint import base_model, publish
from tests.published.formats import FORMATS, ONLY_FOR

Tensors = dict[str, torch.Tensor]
GATE, DOWN = "model.layers.1.mlp.gate_proj", "model.layers.0.mlp.down_proj"
EXPERTS = "model.layers.0.mlp.experts."


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("models")

    def find(family: str) -> Path:
        path = directory / family
        return path if path.exists() else base_model(family, path, num_hidden_layers=2)

    return find


@pytest.fixture
def write(models: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    def written(name: str) -> Path:
        publish(models(ONLY_FOR.get(name, ["llama"])[0]), tmp_path / name, FORMATS[name])
        return tmp_path / name

    return written


def change(model: Path, tensors: Callable[[Tensors], object] = len, **section: Any) -> Path:
    """Changes its tensors, which are in one file then, and its quantization_config."""
    found: Tensors = {}
    for path in sorted(model.glob("*.safetensors*")):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
        path.unlink()
    tensors(found)
    save_file(found, model / "model.safetensors", metadata=metadata | section.pop("metadata", {}))
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] |= section
    (model / "config.json").write_text(json.dumps(config))
    return model


def refused(model: Path, *words: str, **asked: Any) -> None:
    with pytest.raises((CheckpointError, UserError)) as raised:
        spec_of(model, **asked)
    message = str(raised.value)
    assert all(word in message for word in words) and "\n" not in message, message
    assert "cannot be opened as a model" not in message, "which is for what nobody has thought of"


def without(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def replaced(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: value(tensors[name]).contiguous()})


STATE = f"{GATE}.weight.quant_state.bitsandbytes__nf4"


def restated(**changes: Any) -> Callable[[Tensors], object]:
    def edit(state: torch.Tensor) -> torch.Tensor:
        text = json.dumps(json.loads(bytes(state.tolist())) | changes).encode()
        return torch.tensor(list(text), dtype=torch.uint8)

    return replaced(STATE, edit)


@pytest.mark.parametrize(
    ("name", "tensors", "words"),
    [
        ("fp8-blocks", without(f"{GATE}.weight_scale_inv"), (GATE, "in FP8 and has no scale", "download")),
        ("fp8-blocks", replaced(f"{GATE}.weight_scale_inv", lambda t: t.repeat(2, 1)), (GATE, "do not fit")),
        ("fp8-blocks", replaced(f"{GATE}.weight_scale_inv", lambda t: t.int()), (GATE, "do not fit")),
        ("fp8-blocks", replaced(f"{GATE}.weight", lambda t: t.to(torch.float8_e5m2)), (GATE, "float8_e5m2")),
        ("fp8-blocks-joined-experts", without(f"{EXPERTS}down_proj_scale_inv"), (EXPERTS, "no scale is known")),
        ("fp8-blocks-joined-experts", replaced(f"{EXPERTS}down_proj_scale_inv", lambda t: t[:2]), ("do not fit",)),
        ("mxfp4", without(f"{EXPERTS}gate_up_proj_scales"), (EXPERTS, "scales")),
        ("mxfp4", replaced(f"{EXPERTS}gate_up_proj_scales", lambda t: t[:2]), (EXPERTS, "do not fit")),
        ("mxfp4", replaced(f"{EXPERTS}down_proj_blocks", lambda t: t[..., :8]), (EXPERTS, "do not fit")),
        ("ct-int8", without(f"{GATE}.weight_scale"), (GATE, "weight_scale")),
        ("ct-int8", replaced(f"{GATE}.weight_scale", lambda t: t[:7]), (GATE, "do not fit")),
        ("ct-nvfp4", replaced(f"{GATE}.weight_scale", lambda t: t[:, :3]), (GATE, "3 scales for 128 inputs")),
        ("ct-nvfp4", replaced(f"{GATE}.weight_global_scale", lambda t: t.half()), (GATE, "do not fit")),
        ("modelopt-nvfp4", replaced(f"{GATE}.weight_scale_2", lambda t: t.bfloat16()), (GATE, "do not fit")),
        ("modelopt-nvfp4", replaced(f"{GATE}.weight_scale_2", lambda t: t.repeat(2)), (GATE, "do not fit")),
        ("modelopt-nvfp4", lambda t: t.update({f"{GATE}.pre_quant_scale": torch.ones(128)}), ("pre_quant_scale",)),
        ("gptq-4bit-sym-v1", without(f"{GATE}.qzeros"), (GATE, "qzeros")),
        ("gptq-4bit-sym-v1", replaced(f"{GATE}.qzeros", lambda t: t[:, :-1]), (GATE,)),
        ("gptq-4bit-sym-v1", replaced(f"{GATE}.qweight", lambda t: t[:-1]), (GATE, "do not fit")),
        ("gptq-4bit-sym-v1", replaced(f"{GATE}.g_idx", lambda t: t + 1), (GATE, "g_idx", "there are 4 groups")),
        ("gptq-4bit-sym-v1", replaced(f"{GATE}.g_idx", lambda t: t // 2), (GATE, "g_idx", "different sizes")),
        ("gptq-4bit-sym-v1", replaced(f"{GATE}.g_idx", lambda t: t[:-1]), (GATE, "g_idx")),
        ("awq", replaced(f"{GATE}.qzeros", lambda t: t[1:]), (GATE, "do not fit")),
        ("awq", without(f"{GATE}.scales"), (GATE, "scales")),
        ("bnb-nf4", without(f"{GATE}.weight.absmax"), (GATE, "absmax")),
        ("bnb-nf4", replaced(f"{GATE}.weight.absmax", lambda t: t[:-1]), (GATE, "do not fit")),
        ("bnb-nf4", replaced(f"{GATE}.weight.quant_map", lambda t: t * 2), (GATE, "table of its own")),
        ("bnb-nf4", replaced(STATE, lambda t: t[:-1]), (GATE, "quant_state that cannot be read")),
        ("bnb-nf4", restated(shape=[192, 64]), (GATE, "do not fit")),
        ("bnb-nf4", restated(blocksize=128), (GATE, "do not fit")),
        ("bnb-nf4", restated(blocksize=True), (GATE, "quant_state that cannot be read")),
        ("bnb-nf4-double", restated(nested_offset="0.1"), (GATE, "quant_state that cannot be read")),
        ("bnb-nf4-double", restated(nested_blocksize=128), (GATE, "only one for 256")),
        ("bnb-nf4-double", replaced(f"{GATE}.weight.nested_absmax", lambda t: t[:-1]), (GATE, "do not fit")),
        ("bnb-nf4-double", replaced(f"{GATE}.weight.absmax", lambda t: t[:-1]), (GATE, "do not fit")),
        ("bnb-int8", replaced(f"{GATE}.weight_format", lambda t: t + 2), (GATE, "order of a GPU")),
        ("bnb-int8", replaced(f"{GATE}.SCB", lambda t: t[:-1]), (GATE, "do not fit")),
        ("torchao-Int8Tensor", without(f"{GATE}._weight_scale"), (GATE, "weight_scale")),
        ("torchao-Int8Tensor", lambda t: t.update({f"{GATE}._weight_act_pre_scale": torch.ones(1)}), ("pre_scale",)),
        ("torchao-Int4Tensor", without(f"{GATE}._weight_zero_point"), (GATE, "zero_point")),
        ("torchao-Int4Tensor", replaced(f"{GATE}._weight_scale", lambda t: t.t()), (GATE, "do not fit")),
    ],
)  # fmt: skip
def test_tensors(
    name: str, tensors: Callable[[Tensors], object], words: tuple[str, ...], write: Callable[[str], Path]
) -> None:
    refused(change(write(name), tensors), *words)


@pytest.mark.parametrize(
    ("name", "section", "words"),
    [
        ("gptq-4bit-sym-v1", {"checkpoint_format": "marlin"}, ("marlin", "not read", "unquantised model")),
        ("gptq-4bit-sym-v1", {"pack_dtype": "int16"}, ("int16", "only int32")),
        ("gptq-4bit-sym-v1", {"quant_method": "hqq"}, ("hqq", "not read")),
        ("awq", {"version": "exllama"}, ("exllama", "not read", "gemv_fast")),
        ("ct-int8", {"transform_config": {"config_groups": {"R4": {}}}}, ("rotated", "not supported")),
        ("ct-fp8-block", {"config_groups": {"a": {"targets": [], "weights": {
            "num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128"}}}}, ("block_structure",)),
        ("torchao-Int8Tensor", {"metadata": {f"{GATE}.weight": '{"_type": "MXTensor"}'}}, ("MXTensor", GATE)),
        ("torchao-Int8Tensor", {"metadata": {f"{GATE}.weight": "["}}, (GATE, "only Int8Tensor")),
    ],
)  # fmt: skip
def test_sections(name: str, section: dict[str, Any], words: tuple[str, ...], write: Callable[[str], Path]) -> None:
    refused(change(write(name), **section), *words)


@pytest.mark.parametrize("name", ["fp8-blocks", "mxfp4", "ct-nvfp4", "bnb-nf4", "torchao-Int4Tensor"])
def test_activations_are_not_for_floats(name: str, write: Callable[[str], Path]) -> None:
    refused(write(name), "activations=int8", "no whole numbers", activations="int8")


@pytest.mark.parametrize("name", ["ct-int8", "gptq-4bit-asym-v1", "awq", "bnb-int8", "ct-mixed"])
def test_activations_of_whole_numbers(name: str, write: Callable[[str], Path]) -> None:
    """And of no others beside them; what the checkpoint is meant for is not warned of then."""
    spec = spec_of(write(name), activations="int8")
    packings = [t.packing for unit in spec.units for t in unit.tensors if t.packing is not None]
    assert {packing.rounds_rows for packing in packings if packing.kind == "int"} == {True}
    assert not any(packing.rounds_rows for packing in packings if packing.kind != "int")
    assert not spec.warnings


def test_what_is_meant_for_activations_in_few_bits(write: Callable[[str], Path]) -> None:
    (warning,) = spec_of(write("ct-int8")).warnings
    assert "activations=int8" in warning


def test_quantization_on_top(write: Callable[[str], Path]) -> None:
    """Is for nothing where it is what the checkpoint is in, and refused else."""
    for name, bits, other, kind in (("gptq-4bit-sym-v1", 4, 8, "int4"), ("ct-int8", 8, 4, "int8")):
        model = write(name)
        assert spec_of(model, Quantization(bits)) == spec_of(model)
        refused(model, "quantised already", kind, quantization=Quantization(other))
    for name, kind in (("fp8-blocks", "e4m38"), ("bnb-nf4", "nf4")):
        refused(write(name), "quantised already", kind, quantization=Quantization(8))


@pytest.mark.parametrize("method", ["fp8", "mxfp4", "gptq", "bitsandbytes"])
def test_a_section_left_over(method: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    """Fine-tuned models in 16 bits often keep it."""
    model = tmp_path / "model"
    publish(models("llama"), model, FORMATS["fp8-blocks"])
    change(model, lambda tensors: (tensors.clear(), tensors.update(plain(models("llama")))), quant_method=method)
    assert not any(tensor.packing for unit in spec_of(model).units for tensor in unit.tensors)


def plain(model: Path) -> Tensors:
    found: Tensors = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_experts_whose_inputs_are_in_orders_of_their_own(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Gate and up, which are one parameter: they are unpacked, with a warning."""
    exact = publish(models("qwen3-moe"), tmp_path / "model", FORMATS["gptq-4bit-desc-act"])
    expected = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32).state_dict()
    spec = spec_of(tmp_path / "model")
    assert all(torch.equal(tensor, expected[name].to(tensor.dtype)) for name, tensor in unpacked_weights(spec).items())
    (warning,) = spec.warnings
    assert "experts.gate_up_proj" in warning and "kept in 16 bits" in warning


def test_biases_without_a_place(write: Callable[[str], Path]) -> None:
    """AutoGPTQ writes zeros for all layers."""
    model = change(write("gptq-4bit-sym-v1"), lambda t: t.update({f"{GATE}.bias": torch.zeros(192).half()}))
    (warning,) = spec_of(model).warnings
    assert f"{GATE}.bias" in warning

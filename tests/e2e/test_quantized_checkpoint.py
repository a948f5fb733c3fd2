"""Checkpoints in 8 and 4 bits: written by us, read again, read by others; others' read by us."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flexgen_lite import EngineError, FlexGenLite
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.formats.compressed_tensors import EXPERTS
from flexgen_lite.model.quantization import IGNORED, Quantization
from flexgen_lite.workers.conversion import run
from flexgen_lite.workers.conversion.run import quantize
from flexgen_lite.workers.serve import UserError
from tests.compressed_checkpoint import Form, compress, section
from tests.e2e.test_quantization import SETTINGS, answers
from tests.loaded_weights import loaded, spec_of
from tests.quantised_weights import quantised_model
from tests.tiny_models import make_model, ragged_prompts, reference_tokens

has_package = importlib.util.find_spec("compressed_tensors") is not None


def written(model: Path, bits: int, **options: Any) -> Path:
    target = model.with_name(f"{model.name}-int{bits}")
    quantize(model, target, Quantization(bits, **options), 10.0, lambda done, total: None)
    return target


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3-moe", "mixtral", "deepseek-v3"])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, None), (4, None), (4, True), (4, False)])
def test_what_is_read_is_what_is_quantised_while_loading(
    family: str, bits: int, symmetric: bool | None, tmp_path: Path
) -> None:
    model = make_model(family, tmp_path / "model", torch.bfloat16)
    then = spec_of(model, Quantization(bits, symmetric=symmetric))
    now = spec_of(written(model, bits, symmetric=symmetric))
    assert {t.name: t.packing for u in then.units for t in u.tensors} == {
        t.name: t.packing for u in now.units for t in u.tensors
    }
    assert loaded(then) == loaded(now)


@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("opt", 8), ("qwen3-moe", 4), ("qwen3-moe", 8)])
def test_same_tokens(family: str, bits: int, tmp_path: Path) -> None:
    model, prompts = make_model(family, tmp_path / "model"), ragged_prompts(6, longest=40)
    expected = answers(model, prompts, quantization=f"int{bits}")
    for _ in range(2):  # the second one compares checksums
        assert answers(written(model, bits), prompts, layer_slots=2, verify_weights=True) == expected


@pytest.mark.parametrize("settings", [{"activations": "int8"}, {"dtype": "bfloat16"}], ids=str)
def test_in_other_orders(settings: dict[str, Any], tmp_path: Path) -> None:
    """Of values: that of products in 8 bits, and that of products in bfloat16."""
    model, prompts = make_model("qwen3-moe", tmp_path / "model"), ragged_prompts(5, longest=30)
    for bits in (4, 8):
        expected = answers(model, prompts, quantization=f"int{bits}", **settings)
        assert answers(written(model, bits), prompts, layer_slots=2, **settings) == expected


def groups_of(model: Path) -> dict[str, bool]:
    """Whether each target's weights are symmetric."""
    groups = json.loads((model / "config.json").read_text())["quantization_config"]["config_groups"].values()
    return {target: group["weights"]["symmetric"] for group in groups for target in group["targets"]}


@pytest.mark.parametrize(
    ("family", "bits", "symmetric", "groups"),
    [
        ("llama", 4, None, {"Linear": False}),
        ("llama", 4, True, {"Linear": True}),
        ("qwen3-moe", 8, None, {"Linear": True}),
        ("qwen3-moe", 4, None, {"Linear": False, EXPERTS: True}),
        ("qwen3-moe", 4, True, {"Linear": True}),
        ("qwen3-moe", 4, False, {"Linear": False}),
    ],
)
def test_what_config_json_says_of_zeros(
    family: str, bits: int, symmetric: bool | None, groups: dict[str, bool], tmp_path: Path
) -> None:
    target = written(make_model(family, tmp_path / "model"), bits, symmetric=symmetric)
    assert groups_of(target) == groups
    with safe_open(target / "model-00001-of-00001.safetensors", "pt") as new:
        layers = {name.rpartition(".")[0] for name in new.keys() if name.endswith("weight_packed")}  # noqa: SIM118
        for layer in layers:
            is_symmetric = groups[EXPERTS if ".experts." in layer and EXPERTS in groups else "Linear"]
            assert (f"{layer}.weight_zero_point" in new.keys()) != is_symmetric  # noqa: SIM118


FORMS = [
    Form(4, 32, True, torch.float16), Form(4, 16, False), Form(4, None, False), Form(8, 32, False, torch.float32),
    Form(8, None, True),
]  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_checkpoints_of_others(family: str, form: Form, tmp_path: Path) -> None:
    model, prompts = make_model(family, tmp_path / "model"), ragged_prompts(5, longest=30)
    left = compress(model, tmp_path / "packed", form)
    (tmp_path / "rounded").mkdir()
    save_file(left, tmp_path / "rounded" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "rounded" / "config.json").write_text((model / "config.json").read_text())
    expected = reference_tokens(tmp_path / "rounded", prompts, 12)
    assert answers(tmp_path / "packed", prompts, layer_slots=2) == expected


def test_quantised_projection_of_latents(tmp_path: Path) -> None:
    """Latents are kept all the same: it is unpacked while it is loaded."""
    model, prompts = make_model("deepseek-v3", tmp_path / "model"), ragged_prompts(5, longest=30)
    left = compress(model, tmp_path / "packed", Form(4, 16))
    (tmp_path / "rounded").mkdir()
    save_file(left, tmp_path / "rounded" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "rounded" / "config.json").write_text((model / "config.json").read_text())
    assert answers(tmp_path / "packed", prompts) == reference_tokens(tmp_path / "rounded", prompts, 12)
    spec, unpacked = spec_of(tmp_path / "packed"), spec_of(model)
    assert spec.attention == unpacked.attention and spec.attention[0].num_kv_heads == 1
    assert not spec.warnings


def test_layers_that_stay_unless_others_are_named(tmp_path: Path) -> None:
    kept = {"llama": {"lm_head"}, "qwen3-moe": {"lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(4))}}
    for family, names in kept.items():
        target = written(make_model(family, tmp_path / family), 4)
        assert set(json.loads((target / "config.json").read_text())["quantization_config"]["ignore"]) == names


def test_layers_that_stay(tmp_path: Path) -> None:
    """Are named in config.json, and are what they were."""
    model = make_model("qwen3-moe", tmp_path / "model")
    ignore = ("lm_head", "re:.*gate$", "model.layers.1.self_attn.q_proj", "re:.*layers.2.*experts")
    target = written(model, 4, group_size=16, ignore=ignore)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    experts = {f"model.layers.2.mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up", "down")}
    gates = {f"model.layers.{layer}.mlp.gate" for layer in range(4)}
    assert set(config["ignore"]) == {"lm_head", "model.layers.1.self_attn.q_proj", *experts, *gates}
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 16
    with safe_open(target / "model-00001-of-00001.safetensors", "pt") as new:
        for path in model.glob("*.safetensors"):
            for name, tensor in load_file(path).items():
                if name.removesuffix(".weight") in config["ignore"] or tensor.dim() < 2:
                    assert torch.equal(new.get_tensor(name), tensor)
                elif "embed" not in name:
                    assert name.replace(".weight", ".weight_packed") in new.keys()  # noqa: SIM118
    prompts = ragged_prompts(3, longest=20)
    settings = {"quantization": "int4", "quantization_group_size": 16, "quantization_ignore": list(ignore)}
    assert answers(target, prompts) == answers(model, prompts, **settings)


def assert_same_weights(theirs: Any, model: Path, wanted: Quantization) -> None:
    """Their products with scales are in the scales' bfloat16."""
    unread = (*IGNORED, "kv_b_proj")  # which has other readers than its own forward
    expected = quantised_model(model, replace(wanted, ignore=unread))
    for name, ours in expected.named_parameters():
        found = theirs.get_parameter(name)
        assert torch.equal(found, ours) or torch.equal(found, ours.bfloat16().float()), name


@pytest.mark.skipif(not has_package, reason="needs the package compressed-tensors")
@pytest.mark.parametrize("symmetric", [None, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3-moe", "mixtral", "deepseek-v3"])
def test_read_by_transformers(family: str, bits: int, symmetric: bool | None, tmp_path: Path) -> None:
    from transformers import CompressedTensorsConfig

    model = make_model(family, tmp_path / "model")
    target = written(model, bits, symmetric=symmetric)
    config = CompressedTensorsConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, quantization_config=config)
    assert_same_weights(theirs, model, Quantization(bits, symmetric=symmetric))


@pytest.mark.skipif(not has_package, reason="needs the package compressed-tensors")
@pytest.mark.parametrize(("family", "bits"), [("llama", 4), ("qwen3-moe", 4), ("mixtral", 4), ("mixtral", 8)])
@torch.inference_mode()
def test_read_by_transformers_in_few_bits(family: str, bits: int, tmp_path: Path) -> None:
    """Which unpacks them at the first forward."""
    model = make_model(family, tmp_path / "model")
    theirs: Any = AutoModelForCausalLM.from_pretrained(written(model, bits, symmetric=True), dtype=torch.float32)
    theirs(torch.tensor([[1, 2, 3]]))
    assert_same_weights(theirs, model, Quantization(bits, symmetric=True))


def refused(model: Path, *words: str, **settings: Any) -> None:
    with pytest.raises(EngineError) as raised, FlexGenLite(model, **SETTINGS | settings):
        pass
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value), raised.value


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    compress(make_model("llama", tmp_path / "model"), tmp_path / "packed", Form())
    return tmp_path / "packed"


def test_twice_is_refused(packed: Path) -> None:
    refused(packed, "quantization", "quantised already", "leave the key out", quantization="int8")
    refused(packed, "load_format=dummy", "unquantised", load_format="dummy")


def change_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return damage


def change_section(**changes: Any) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"quantization_config": section(Form(), **changes)}))

    return damage


Q = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_section(format="marlin-24"), ("marlin-24", "not read", "unquantised model")),
        (change_section(config_groups={}), ("no config_groups",)),
        (change_section(config_groups={"a": {"weights": 4}}), ("a of config_groups has no weights",)),
        (change_section(sparsity_config={"format": "sparse-24"}), ("sparse-24",)),
        (change_section(config_groups={"a": {"targets": [], "weights": {"num_bits": 9}}}), ("9 bits",)),
        (
            change_section(config_groups={"a": {"targets": ["re:("], "weights": {"num_bits": 4}}}),
            ("no regular expression",),
        ),
        (
            change_section(config_groups={"a": {"targets": ["Linear"], "weights": {"num_bits": 8}}}),
            ("does not belong to these weights",),
        ),
        (change_tensors(lambda t: t.pop(Q + "weight_scale")), ("q_proj has no weight_scale",)),
        (
            change_section(config_groups={"a": {"targets": [], "weights": {"num_bits": 4, "symmetric": False}}}),
            ("has no weight_zero_point", "not symmetric"),
        ),
        (change_tensors(lambda t: t.update({Q + "weight_g_idx": torch.arange(64)})), ("weight_g_idx of int64",)),
        (
            change_tensors(lambda t: t.update({Q + "weight_g_idx": torch.empty(0, dtype=torch.int32)})),
            ("weight_g_idx of int32 [0]",),
        ),
        (change_tensors(lambda t: t.update({Q + "weight": torch.zeros(64, 64)})), ("there twice",)),
        (
            change_tensors(lambda t: t.update({Q + "weight_scale": t[Q + "weight_scale"].repeat(1, 4)})),
            ("every 8 inputs", "multiples of 16"),
        ),
        (
            change_tensors(lambda t: [t.pop(name) for name in list(t) if name.endswith("weight_packed")]),
            ("none of its weights",),
        ),
    ],
)  # fmt: skip
def test_damage(damage: Callable[[Path], None], words: tuple[str, ...], packed: Path) -> None:
    damage(packed)
    with pytest.raises((UserError, CheckpointError)) as raised:
        spec_of(packed)
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value), raised.value


@pytest.mark.parametrize(("family", "words"), [("gpt-oss", "joins all experts"), ("gpt2", "no weight of a linear")])
def test_what_cannot_be_written(family: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as raised:
        written(make_model(family, tmp_path / "model"), 4)
    assert "while it is loaded" in str(raised.value) and not (tmp_path / "model-int4").exists()


def test_where_it_cannot_be_written(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed.with_name("model")
    with pytest.raises(CheckpointError, match="quantised already"):
        written(packed, 4)
    target = written(model, 4)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert written(model, 4) == target and before == {path: path.stat().st_mtime_ns for path in target.iterdir()}
    for others in ({"group_size": 16}, {"symmetric": True}):
        with pytest.raises(UserError, match="holds something else"):
            written(model, 4, **others)
    with pytest.raises(UserError, match="weights in 8 bits have no zeros"):
        written(model, 8, symmetric=False)
    with pytest.raises(UserError, match="is to be quantised"):
        quantize(model, model, Quantization(4), 1.0, lambda *_: None)
    (packed / "model").mkdir()
    with run._claimed(packed / "model", "digest", spec := run.open_source(model, Quantization(4))):  # noqa: SIM117
        with pytest.raises(UserError, match="another process"), run._claimed(packed / "model", "digest", spec):
            pass
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: run.shutil._ntuple_diskusage(0, 0, 1 << 20))
    with pytest.raises(UserError, match=r"its disk has 1\.0 MiB: make room"):
        written(model, 8)
    assert not (packed.parent / "model-int8").exists()

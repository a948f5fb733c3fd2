"""Checkpoints in few bits whose parts do not fit: one sentence each, that names file, layer and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flexgen_lite.model.checkpoint import open_checkpoint
from flexgen_lite.model.files import CheckpointError
from tests.stored_weights import Stored, awq, compressed, gptq

Change = Callable[[dict[str, torch.Tensor]], object]


def refused(directory: Path, stored: Stored, *words: str) -> None:
    (directory / "config.json").write_text(json.dumps({"quantization_config": stored.section}))
    save_file({name: tensor.contiguous() for name, tensor in stored.tensors.items()}, directory / "model.safetensors")
    message = fault_of(directory)
    assert "\n" not in message
    for word in (*words, str(directory)):
        assert word in message, message


def fault_of(directory: Path) -> str:
    """Of the checkpoint, or of its layer x."""
    try:
        tensors = open_checkpoint(directory).tensors
    except CheckpointError as error:
        return str(error)
    return next(tensors[name].fault for name in ("x.weight", "x") if name in tensors)


def test_what_is_wrong_with_a_layer_counts_only_where_the_model_has_it(tmp_path: Path) -> None:
    """A vision part's layer, say, or that of a head for more tokens at once."""
    stored = compressed(96, 256, 32)
    others = {"visual.fc.weight": torch.zeros((8, 20)).to(FP8), "visual.fc.weight_scale": torch.ones(8, 1)}
    others |= {"mtp.fc.weight": torch.zeros((8, 32)).to(FP8), "left.scale2": torch.zeros(4).to(FP8)}
    stored.tensors.update(others)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stored.section}))
    save_file({name: tensor.contiguous() for name, tensor in stored.tensors.items()}, tmp_path / "model.safetensors")
    tensors = open_checkpoint(tmp_path).tensors
    assert tensors["x.weight"].bits is not None
    faults = {name: tensor.fault for name, tensor in tensors.items() if tensor.fault}
    assert faults.keys() == {"visual.fc.weight", "mtp.fc.weight", "left.scale2"}
    assert "every 20 inputs" in faults["visual.fc.weight"] and "weight_scale" in faults["mtp.fc.weight"]


def sorted_with(value: int) -> Stored:
    stored = gptq(96, 256, 32, is_sorted=True)
    stored.tensors["x.g_idx"][17] = value
    return stored


def without(stored: Stored, name: str) -> Stored:
    del stored.tensors[name]
    return stored


def instead(stored: Stored, name: str, tensor: torch.Tensor) -> Stored:
    stored.tensors[name] = tensor
    return stored


FP8 = torch.float8_e4m3fn
MXFP4 = {
    "x_blocks": torch.zeros((2, 16, 2, 16), dtype=torch.uint8),
    "x_scales": torch.zeros((2, 16, 2), dtype=torch.uint8),
}
NVFP4 = {
    "x.weight": torch.zeros((16, 32), dtype=torch.uint8),
    "x.weight_scale": torch.zeros((16, 4), dtype=torch.uint8).view(FP8),
    "x.weight_scale_2": torch.ones(()),
}
BNB_STATE = {"blocksize": 64, "shape": [16, 64], "quant_type": "nf4", "dtype": "bfloat16"}


def bitsandbytes(state: Any, **changes: torch.Tensor) -> Stored:
    from flexgen_lite.model.packing import TABLES

    text = state if isinstance(state, bytes) else json.dumps({**BNB_STATE, **state}).encode()
    found = {
        "x.weight": torch.zeros((512, 1), dtype=torch.uint8),
        "x.weight.absmax": torch.ones(16),
        "x.weight.quant_map": torch.tensor(TABLES["nf4"]),
        "x.weight.quant_state.bitsandbytes__nf4": torch.frombuffer(bytearray(text), dtype=torch.uint8),
    }
    return Stored({**found, **changes}, {"quant_method": "bitsandbytes"}, torch.empty(0))


def of(tensors: dict[str, torch.Tensor], method: str, **changes: torch.Tensor) -> Stored:
    return Stored({**tensors, **changes}, {"quant_method": method}, torch.empty(0))


CASES: dict[str, tuple[Callable[[], Stored], tuple[str, ...]]] = {
    "no scales": (lambda: without(gptq(96, 256, 32), "x.scales"), ("layer x has no scales", "download")),
    "no zeros": (lambda: without(gptq(96, 256, 32), "x.qzeros"), ("layer x has no qzeros", "download")),
    "zeros of another width": (
        lambda: instead(gptq(96, 256, 32), "x.qzeros", torch.zeros((8, 11), dtype=torch.int32)),
        ("layer x", "do not fit", "qzeros int32 [8, 11]"),
    ),
    "five bits": (
        lambda: instead(gptq(96, 256, 32), "x.qzeros", torch.zeros((8, 15), dtype=torch.int32)),
        ("layer x has 5 bits", "2, 3, 4 and 8", "unquantised"),
    ),
    "groups of eight": (lambda: gptq(96, 256, 8), ("layer x has a scale for every 8 inputs", "16", "unquantised")),
    "groups that do not divide": (
        lambda: instead(
            instead(gptq(96, 256, 32), "x.scales", torch.ones((7, 96)).half()),
            "x.qzeros", torch.zeros((7, 12), dtype=torch.int32),
        ),
        ("layer x has 7 scales for 256 inputs", "unquantised"),
    ),
    "an input of no group": (lambda: sorted_with(8), ("layer x has an input in group 8 of g_idx", "8 groups")),
    "an input of group -1": (lambda: sorted_with(-1), ("layer x has an input in group -1 of g_idx", "download")),
    "groups of different sizes": (lambda: sorted_with_more(), ("layer x has groups of different sizes in g_idx",)),
    "a short g_idx": (
        lambda: instead(gptq(96, 256, 32), "x.g_idx", torch.zeros(9, dtype=torch.int32)),
        ("layer x has a g_idx of int32 [9], not 256 int32",),
    ),
    "packed and plain": (
        lambda: instead(gptq(96, 256, 32), "x.weight", torch.ones(96, 256)),
        ("x.weight", "is there twice, as x.qweight", "download"),
    ),
    "compressed and plain": (
        lambda: instead(compressed(96, 256, 32), "x.weight", torch.ones(96, 256)),
        ("x.weight", "is there twice, as x.weight_packed"),
    ),
    "marlin": (
        lambda: gptq(96, 256, 32, version="marlin"), ("config.json", "the layout marlin is not read", "unquantised")
    ),
    "gemv of other groups": (
        lambda: awq(72, 1024, 128, "gemv")._replace(section={"quant_method": "awq", "group_size": 32}),
        ("layer x has 16 scales for 1024 inputs", "group_size 32"),
    ),
    "no weight_shape": (
        lambda: without(compressed(96, 256, 32, 3), "x.weight_shape"), ("layer x has no weight_shape",)
    ),
    "sixteen bits": (
        lambda: compressed(96, 256, 32)._replace(section=section_of(num_bits=16)), ("16 bits", "unquantised")
    ),
    "an unknown type": (
        lambda: compressed(96, 256, 32)._replace(section=section_of(type="posit")), ("posit", "unquantised")
    ),
    "an unknown format": (
        lambda: compressed(96, 256, 32)._replace(section={**section_of(), "format": "marlin-24"}), ("marlin-24",)
    ),
    "FP8 without a scale": (lambda: of({"x.weight": torch.zeros((16, 64)).to(FP8)}, "fp8"), ("layer x", "no scale")),
    "MXFP4 without scales": (
        lambda: of({"x_blocks": MXFP4["x_blocks"]}, "mxfp4"), ("layer x has no scales, which x_blocks needs",)
    ),
    "MXFP4 and plain": (lambda: of(MXFP4, "mxfp4", x=torch.ones(2, 64, 16)), ("layer x is there twice",)),
    "NVFP4 of two factors": (
        lambda: of(NVFP4, "modelopt", **{"x.weight_scale_2": torch.ones(2)}), ("layer x", "do not fit")
    ),
    "NVFP4 of scaled inputs": (
        lambda: of(NVFP4, "modelopt", **{"x.pre_quant_scale": torch.ones(64)}), ("pre_quant_scale", "unquantised")
    ),
    "no JSON": (lambda: bitsandbytes(b"{"), ("layer x has a quant_state that cannot be read",)),
    "no block": (lambda: bitsandbytes({"blocksize": 0}), ("layer x has a quant_state that cannot be read",)),
    "a shape that does not fit": (lambda: bitsandbytes({"shape": [16, 65]}), ("layer x", "do not fit")),
    "too few scales": (
        lambda: bitsandbytes({}, **{"x.weight.absmax": torch.ones(15)}), ("layer x", "do not fit", "absmax")
    ),
    "a table of its own": (
        lambda: bitsandbytes({}, **{"x.weight.quant_map": torch.ones(16)}), ("a table of its own", "unquantised")
    ),
}  # fmt: skip


def sorted_with_more() -> Stored:
    stored = gptq(96, 256, 32, is_sorted=True)
    order = stored.tensors["x.g_idx"]
    order[(order == 0).nonzero()[0]] = 1
    return stored


def section_of(**changes: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **changes}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, tmp_path: Path) -> None:
    make, words = CASES[case]
    refused(tmp_path, make(), *words)


@pytest.mark.parametrize("method", ["hqq", "aqlm", "exl2", "vptq", "quark", "eetq"])
def test_methods_that_are_not_read(method: str, tmp_path: Path) -> None:
    refused(tmp_path, of({"x.weight": torch.ones(4)}, method), f"quantised ({method})", "unquantised", "dequantise")


def test_mlx_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization": {"group_size": 64, "bits": 4}}))
    save_file({"x.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"quantised \(mlx\), which is not read"):
        open_checkpoint(tmp_path)

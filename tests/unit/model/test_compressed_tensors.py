"""What config.json says of weights in few bits."""

from __future__ import annotations

import pytest

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.formats.compressed_tensors import read_schemes, section_of
from flexgen_lite.model.formats.section import Section
from flexgen_lite.model.packing import Packing

WITH, WITHOUT = (Packing(4, 32, "bfloat16", "bfloat16", "uint8" if has_zeros else "") for has_zeros in (True, False))
DENSE = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.shared_experts.up_proj", "lm_head"]
EXPERTS = ["model.layers.0.mlp.experts.3.up_proj", "model.layers.11.block_sparse_moe.experts.0.w1"]


def test_experts_are_named_apart() -> None:
    section = section_of(dict.fromkeys(DENSE, WITH) | dict.fromkeys(EXPERTS, WITHOUT), ["lm_head"])
    assert [group["weights"]["symmetric"] for group in section["config_groups"].values()] == [False, True]
    read = read_schemes(Section("compressed-tensors", section, "config.json"))
    assert {read.num_bits(layer) for layer in (*DENSE, *EXPERTS)} == {4}


@pytest.mark.parametrize("packing", [WITH, WITHOUT])
def test_all_alike_are_one_group(packing: Packing) -> None:
    section = section_of(dict.fromkeys([*DENSE, *EXPERTS], packing), [])
    assert [group["targets"] for group in section["config_groups"].values()] == [["Linear"]]


@pytest.mark.parametrize(("layer", "packing"), [("moe.experts.0.dense", WITH), ("moe.expert_0.up_proj", WITHOUT)])
def test_names_that_do_not_tell_experts(layer: str, packing: Packing) -> None:
    others = {DENSE[0]: WITH, EXPERTS[0]: WITHOUT}
    with pytest.raises(CheckpointError, match=r"quantization_symmetric=true") as raised:
        section_of({layer: packing, **others}, [])
    assert layer in str(raised.value)

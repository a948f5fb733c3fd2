"""Weights of published formats, from files through the loader: what they stand for, rounded once."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flexgen_lite.memory.slot_layout import TensorSource, layout_unit
from flexgen_lite.model.checkpoint import Checkpoint, open_checkpoint
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.wire.worker_messages import AttachLoader, Load
from flexgen_lite.workers.compute.unpacked_weights import unpacked
from flexgen_lite.workers.loader import state as loader_state
from flexgen_lite.workers.loader.state import LoaderState
from flexgen_lite.workers.model.quantization import HeldBits, stored_packing
from flexgen_lite.workers.model.weight_trace import to_pieces, trace
from tests.stored_weights import Stored, awq, compressed, gptq

NAME = "x.weight"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_state, "MAX_CHUNK_BYTES", 16384)


def opened(directory: Path, stored: Stored, **changes: Any) -> Checkpoint:
    section = {**stored.section, **changes}
    (directory / "config.json").write_text(json.dumps({"quantization_config": section} if stored.section else {}))
    save_file(stored.tensors, directory / "model.safetensors")
    return open_checkpoint(directory)


def loaded(checkpoint: Checkpoint, order: str = "bfloat16", dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """The weight after its way through the loader."""
    weight = trace(checkpoint.tensors[NAME], torch.bfloat16)
    packing = stored_packing(NAME, weight.parts, HeldBits({NAME: False}, order, False))
    assert packing is not None
    shape = tuple(weight.shape)
    pieces = tuple(piece for part in weight.parts for piece in to_pieces(part, shape, is_packed=True))
    unit = layout_unit("u", [TensorSource(NAME, "bfloat16", shape, pieces, packing)])
    arena, size = mmap.mmap(-1, unit.num_bytes), unit.num_bytes
    arena[:] = b"\xa5" * size
    attach = AttachLoader(checkpoint.files, checkpoint.stamps, (unit,), (0,), size, "auto", False, 2, ())
    state = LoaderState(attach, arena)
    try:
        state.load(Load(0, 0))
    finally:
        state.close()
    tensor = unit.tensors[0]
    memory = torch.frombuffer(arena, dtype=torch.uint8)[tensor.offset : tensor.offset + tensor.num_bytes]
    return unpacked(memory, packing, shape, 0, dtype)


FORMS: dict[str, Stored] = {
    **{
        f"gptq-{bits}-{version}": gptq(96, 1024, 64, bits, version)
        for bits in (2, 3, 4, 8)
        for version in ("gptq", "gptq_v2")
    },
    **{f"gptq-{bits}-desc-act": gptq(224, 1024, 32, bits, is_sorted=True) for bits in (2, 3, 4, 8)},
    "gptq-one-group": gptq(96, 1024, 1024, 8),
    "awq": awq(224, 1024, 128),
    "awq-symmetric": awq(96, 1024, 128, zero_point=False),
    "awq-gemv": awq(72, 1024, 64, "gemv"),
    "awq-gemv-fast": awq(72, 1024, 128, "gemv_fast"),
    **{f"compressed-{bits}": compressed(96, 1024, 128, bits, has_zeros=True) for bits in range(1, 9)},
    **{f"compressed-sparse-{bits}": compressed(70, 1024, 128, bits, is_sparse=True) for bits in (3, 5, 6, 7)},
    **{f"compressed-{bits}-g-idx": compressed(70, 1024, 32, bits, is_sorted=True) for bits in (3, 4, 8)},
}


@pytest.mark.parametrize("order", ["bfloat16", "int8"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str, order: str, tmp_path: Path) -> None:
    stored = FORMS[form]
    checkpoint = opened(tmp_path, stored)
    assert set(checkpoint.tensors) == {NAME}
    assert torch.equal(loaded(checkpoint, order), stored.weight.bfloat16())


@pytest.mark.parametrize("form", ["gptq-4-gptq", "awq", "awq-gemv", "awq-gemv-fast", "compressed-4", "compressed-8"])
def test_forms_are_known_by_their_tensors(form: str, tmp_path: Path) -> None:
    stored = FORMS[form]._replace(section={})
    if form == "awq-gemv":  # the size of its groups is nowhere else
        stored = awq(72, 1024, 128, "gemv")._replace(section={})
    assert torch.equal(loaded(opened(tmp_path, stored)), stored.weight.bfloat16())


@pytest.mark.parametrize("is_less", [True, False])
def test_zeros_of_symmetric_weights_tell_the_version(is_less: bool, tmp_path: Path) -> None:
    """Whatever config.json says: programs have written the one and called it the other."""
    stored = gptq(96, 1024, 64)
    word = 0x77777777 if is_less else 0x88888888
    stored.tensors["x.qzeros"][...] = torch.tensor(word - (0 if is_less else 1 << 32), dtype=torch.int32)
    checkpoint = opened(tmp_path, stored, sym=True, checkpoint_format="gptq")
    codes = (stored.tensors["x.qweight"].T.contiguous()[..., None] >> (4 * torch.arange(8))) & 15
    expected = (codes.reshape(96, 1024) - 8) * stored.tensors["x.scales"].T.float().repeat_interleave(64, 1)
    assert torch.equal(loaded(checkpoint), expected.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_products_are_rounded_to_what_scales_are_in(dtype: torch.dtype, has_zeros: bool, tmp_path: Path) -> None:
    stored = compressed(96, 1024, 32, 4, has_zeros, scale_dtype=dtype)
    assert torch.equal(loaded(opened(tmp_path, stored)), stored.weight.to(dtype).bfloat16())


@pytest.mark.parametrize("form", ["gptq-4-gptq", "awq-gemv-fast", "compressed-4"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_scales_that_are_no_numbers(form: str, value: float, tmp_path: Path) -> None:
    stored = FORMS[form]
    name = next(name for name in stored.tensors if "scale" in name)
    tensors = {**stored.tensors, name: stored.tensors[name].clone()}
    tensors[name][2, 3] = value
    checkpoint = opened(tmp_path, stored._replace(tensors=tensors))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} has scales that are infinite"):
        loaded(checkpoint)

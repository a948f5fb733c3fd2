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
    pieces = tuple(piece for part in weight.parts for piece in to_pieces(part, shape))
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

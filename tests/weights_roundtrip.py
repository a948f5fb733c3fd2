"""Load a saved model through the weights path, for tests: map, load every unit, bind."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from flexgen_lite.model.checkpoint import open_checkpoint, stamp
from flexgen_lite.model.spec import UnitSpec
from flexgen_lite.wire.worker_messages import AttachLoader, Load
from flexgen_lite.workers.loader.state import LoaderState
from flexgen_lite.workers.model.weight_map import Binding, map_weights
from tests.meta_model import build_on_meta, decoder_layers


def attach_message(units: tuple[UnitSpec, ...], files: tuple[str, ...], load_format: str = "auto") -> AttachLoader:
    """One slot per unit, one after another."""
    offsets = [0]
    for unit in units:
        offsets.append(offsets[-1] + unit.num_bytes)
    return AttachLoader(
        files=files,
        stamps=tuple(stamp(os.stat(file)) for file in files),
        units=units,
        slot_offsets=tuple(offsets[:-1]),
        arena_bytes=offsets[-1],
        load_format=load_format,
        verify=False,
        threads=3,
        cpus=(),
    )


def load_units(attach: AttachLoader) -> mmap.mmap:
    arena = mmap.mmap(-1, attach.arena_bytes)
    state = LoaderState(attach, arena)
    for index in range(len(attach.units)):
        state.load(Load(index, index))
    state.close()
    return arena


def load_model(directory: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, tuple[UnitSpec, ...], tuple[str, ...]]:
    """The model with its weights bound to slots, its units, and the warnings."""
    config: Any = AutoConfig.from_pretrained(directory)
    model = build_on_meta(config, dtype)
    layers = decoder_layers(model)
    checkpoint = open_checkpoint(directory)
    units, warnings = map_weights(model, layers, checkpoint, dtype)
    attach = attach_message(units, checkpoint.files)
    arena = load_units(attach)
    binding = Binding(model, layers, units)
    whole = torch.frombuffer(arena, dtype=torch.uint8)
    for index, offset in enumerate(attach.slot_offsets):
        binding.bind(index, whole[offset : offset + units[index].num_bytes])
    return model, units, warnings


def assert_same_weights(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    """Every parameter and persistent buffer is the same, bit for bit."""
    wanted, got = expected.state_dict(), model.state_dict()
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name

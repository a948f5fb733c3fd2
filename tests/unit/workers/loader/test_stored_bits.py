"""Weights that are stored in few bits, on their way into the order of packing.py: as PyTorch puts them there."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from flexgen_lite.memory.slot_layout import TensorSource, layout_unit
from flexgen_lite.model.checkpoint import stamp
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.packing import Packing
from flexgen_lite.model.spec import SourcePiece, StoredPart
from flexgen_lite.wire.worker_messages import AttachLoader, Load
from flexgen_lite.workers.compute.unpacked_weights import unpacked
from flexgen_lite.workers.loader import bounce_plan
from flexgen_lite.workers.loader import state as loader_state
from flexgen_lite.workers.loader.state import LoaderState
from tests.compressed_checkpoint import parts_of
from tests.packed_weights import packed

KINDS = {"values": "weight_packed", "scales": "weight_scale", "zeros": "weight_zero_point"}
Region = tuple[tuple[int, int], ...]


class Sources:
    """Weights `[N, K]` of whole numbers in a file, each part behind some bytes that do not count."""

    def __init__(self, path: Path, bits: int, group: int, has_zeros: bool, scale_dtype: torch.dtype) -> None:
        self.path, self._bits, self._group, self._has_zeros = path, bits, group, has_zeros
        self._scale_dtype, self._generator = scale_dtype, torch.Generator().manual_seed(bits + group)
        self._data = bytearray()

    def add(self, columns: int, width: int, **place: Any) -> tuple[list[SourcePiece], tuple[torch.Tensor, ...]]:
        """Its pieces, and q, scales and zeros."""
        most, groups = 1 << (self._bits - 1), width // self._group
        q = torch.randint(-most, most, (columns, width), generator=self._generator)
        scale = torch.rand((columns, groups), generator=self._generator).to(self._scale_dtype)
        zero = torch.randint(-most, most, (columns, groups), generator=self._generator)
        parts = parts_of(q, scale, zero if self._has_zeros else None, self._bits)
        pieces = []
        for kind, name in KINDS.items():
            if name not in parts:
                continue
            tensor = parts[name]
            self._data += bytes(5)
            dtype = str(tensor.dtype).removeprefix("torch.")
            data = tensor.view(torch.uint8).numpy().tobytes()
            layout = {"values": "stream", "scales": "items", "zeros": "packed_zeros"}[kind]
            part = StoredPart(kind, layout, self._bits, (1, self._group))
            piece = SourcePiece(0, len(self._data), len(data), name, dtype, (columns, width), part=part, **place)
            pieces.append(piece)
            self._data += data
        return pieces, (q, scale.float(), zero)

    def load(self, packing: Packing, shape: tuple[int, ...], pieces: list[SourcePiece]) -> bytes:
        self.path.write_bytes(self._data)
        unit = layout_unit("u", [TensorSource("w.weight", "bfloat16", shape, tuple(pieces), packing)])
        stamps, size = (stamp(os.stat(self.path)),), unit.num_bytes
        arena = mmap.mmap(-1, size)
        state = LoaderState(AttachLoader((str(self.path),), stamps, (unit,), (0,), size, "auto", False, 2, ()), arena)
        try:
            state.load(Load(0, 0))
        finally:
            state.close()
        tensor = unit.tensors[0]
        return arena[tensor.offset : tensor.offset + tensor.num_bytes]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_state, "MAX_CHUNK_BYTES", 16384)


def expected(parts: list[tuple[torch.Tensor, ...]], packing: Packing) -> bytes:
    q, scale, zero = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    return packed(q, scale, zero if packing.has_zeros else None, packing).numpy().tobytes()


def same(got: bytes, wanted: bytes, packing: Packing, shape: tuple[int, ...]) -> bool:
    """But for the columns that fill the last block."""
    count = packing.dimensions(shape)[0]
    memories = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in (got, wanted)]
    found = [[unpacked(m, packing, shape, index, torch.float32) for index in range(count)] for m in memories]
    return len(got) == len(wanted) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("order", ["bfloat16", "int8"])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("scale_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bits", [8, 4])
def test_single_weights(bits: int, scale_dtype: str, has_zeros: bool, order: str, tmp_path: Path) -> None:
    for columns, width, group in ((64, 64, 32), (200, 272, 16), (6, 4096, 4096), (131, 96, 96)):
        sources = Sources(tmp_path / "w", bits, group, has_zeros, getattr(torch, scale_dtype))
        pieces, parts = sources.add(columns, width)
        kept = scale_dtype
        packing = Packing(bits, group, order, kept, "uint8" if has_zeros else "")
        got = sources.load(packing, (columns, width), pieces)
        wanted = expected([parts], packing)
        assert same(got, wanted, packing, (columns, width))
        assert columns % 64 or got == wanted


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_experts(bits: int, is_transposed: bool, tmp_path: Path) -> None:
    """Each of two weights, one beside the other; where the model has them turned, so are the views."""
    sources = Sources(tmp_path / "w", bits, 32, True, torch.bfloat16)
    packing = Packing(bits, 32, "bfloat16", "bfloat16", "uint8", is_transposed)
    half, width, experts = 40, 64, 3
    all_pieces: list[SourcePiece] = []
    joined: list[tuple[torch.Tensor, ...]] = []
    for expert in range(experts):
        found = []
        for first in (0, half):
            views: tuple[tuple[str | int, ...], ...] = (("reshape", 1, half, width),)
            region: Region = ((expert, expert + 1), (first, first + half), (0, width))
            if is_transposed:
                views, region = (*views, ("transpose", 1, 2)), (region[0], region[2], region[1])
            pieces, parts = sources.add(half, width, views=views, region=region)
            all_pieces += pieces
            found.append(parts)
        joined.append(tuple(torch.cat(tensors) for tensors in zip(*found, strict=True)))
    shape = (experts, width, 2 * half) if is_transposed else (experts, 2 * half, width)
    got = sources.load(packing, shape, all_pieces)
    assert same(got, expected(joined, packing), packing, shape)


def test_some_rows_of_a_source(tmp_path: Path) -> None:
    """That do not begin where a word of zeros does."""
    sources = Sources(tmp_path / "w", 4, 32, True, torch.bfloat16)
    packing = Packing(4, 32, "bfloat16", "bfloat16", "uint8")
    pieces, parts = sources.add(300, 64, views=(("slice", 0, 13, 141),))
    got = sources.load(packing, (128, 64), pieces)
    assert got == expected([tuple(tensor[13:141] for tensor in parts)], packing)


@pytest.mark.parametrize("views", [(("transpose", 0, 1),), (("slice", 1, 0, 32),)])
def test_what_is_not_row_by_row(views: tuple[tuple[str | int, ...], ...], tmp_path: Path) -> None:
    sources = Sources(tmp_path / "w", 4, 32, False, torch.bfloat16)
    pieces, _ = sources.add(64, 64, views=views)
    shape = (64, 64) if views[0][0] == "transpose" else (64, 32)
    unit = layout_unit(
        "u", [TensorSource("w", "bfloat16", shape, tuple(pieces), Packing(4, 32, "bfloat16", "bfloat16"))]
    )
    with pytest.raises(CheckpointError, match="other than row by row: use the unquantised"):
        bounce_plan.plan_batches(unit, 1 << 20)

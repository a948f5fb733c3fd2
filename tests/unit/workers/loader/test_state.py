"""Loading units into slots: reads, casts, views, dummy weights and what goes wrong."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flexgen_lite.memory.slot_layout import TensorSource, layout_unit
from flexgen_lite.model.checkpoint import CheckpointError, stamp
from flexgen_lite.model.spec import ITEM_BYTES, SourcePiece, TensorSpec, UnitSpec
from flexgen_lite.wire.worker_messages import AttachLoader, Load
from flexgen_lite.workers.loader import bounce_plan, disk_reader
from flexgen_lite.workers.loader import state as loader_state
from flexgen_lite.workers.loader.bounce_plan import apply_views, plan_batches
from flexgen_lite.workers.loader.state import LoaderState

DTYPES = ("float32", "bfloat16", "float16")


def random_bytes(count: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(count)


def piece(offset: int, shape: tuple[int, ...], dtype: str = "float16", **options: object) -> SourcePiece:
    size = int(np.prod(shape)) * ITEM_BYTES[dtype]
    return replace(SourcePiece(0, offset, size, "stored", dtype, shape), **options)  # type: ignore[arg-type]


def attach(units: tuple[UnitSpec, ...], path: Path | str, load_format: str = "auto") -> AttachLoader:
    size = max(unit.num_bytes for unit in units)
    stamps = (stamp(os.stat(path)),) if load_format == "auto" else ()
    return AttachLoader(
        (str(path),) if stamps else (), stamps, units, (0, size + 4096), 2 * size + 4096, load_format, False, 3, ()
    )


def run(message: AttachLoader, *orders: Load) -> mmap.mmap:
    arena = mmap.mmap(-1, message.arena_bytes)
    state = LoaderState(message, arena)
    try:
        for order in orders:
            state.load(order)
    finally:
        state.close()
    return arena


def loaded(arena: mmap.mmap, tensor: TensorSpec, slot_offset: int = 0) -> torch.Tensor:
    start = slot_offset + tensor.offset
    data = torch.frombuffer(bytearray(arena[start : start + tensor.num_bytes]), dtype=getattr(torch, tensor.dtype))
    return data.reshape(tensor.shape)


def as_tensor(data: bytes, dtype: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, dtype))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounce buffers of 16 KiB, so that ordinary tensors take many chunks."""
    monkeypatch.setattr(loader_state, "MAX_CHUNK_BYTES", 16384)


@pytest.mark.parametrize("tail", [0, 1, 4095])
def test_direct_extents_up_to_the_end_of_the_file(tail: int, tmp_path: Path) -> None:
    data = random_bytes(70_000 * 2 + 10 + tail)
    (tmp_path / "w").write_bytes(data)
    sources = [TensorSource("a", "float16", (70_000,), (piece(10 + tail // 2 * 2, (70_000,)),))]
    unit = layout_unit("u", sources)
    message = attach((unit,), tmp_path / "w")
    arena = mmap.mmap(-1, message.arena_bytes)
    state = LoaderState(message, arena)
    read = state.load(Load(0, 1))
    state.close()
    assert read == min(unit.extents[0].num_bytes, len(data) - unit.extents[0].file_offset)
    start = message.slot_offsets[1] + unit.tensors[0].offset
    assert arena[start : start + 140_000] == data[10 + tail // 2 * 2 :][:140_000]


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.usefixtures("small_chunks")
def test_casts(source: str, target: str, tmp_path: Path) -> None:
    """Every 16-bit pattern and a million random float32 ones: as torch casts them, but for NaN payloads."""
    count = 65536 if source != "float32" else 1 << 20
    stored = np.arange(65536, dtype=np.uint16).tobytes() if source != "float32" else random_bytes(count * 4, seed=3)
    (tmp_path / "w").write_bytes(b"abc" * 2 + stored)
    tensor = TensorSource("a", target, (count // 64, 64), (piece(6, (count // 64, 64), source),))
    unit = layout_unit(
        "u", [replace(tensor, pieces=(replace(tensor.pieces[0], views=(("reshape", count // 64, 64),)),))]
    )
    assert unit.converted == (0,)
    got = loaded(run(attach((unit,), tmp_path / "w"), Load(0, 0)), unit.tensors[0]).flatten()
    expected = as_tensor(stored, source).to(getattr(torch, target))
    assert torch.equal(got.isnan(), expected.isnan())
    bits = {4: torch.int32, 2: torch.int16}[ITEM_BYTES[target]]
    number = ~expected.isnan()
    assert torch.equal(got.view(bits)[number], expected.view(bits)[number])


VIEWS: dict[str, tuple[tuple[int, ...], tuple[tuple[str | int, ...], ...]]] = {
    "none": ((40, 300), ()),
    "transpose": ((40, 300), (("transpose", 0, 1),)),
    "reshape": ((40, 300), (("reshape", 1, 80, 150),)),
    "slice rows": ((40, 300), (("slice", 0, 7, 29),)),
    "slice columns": ((40, 300), (("slice", 1, 5, 205),)),
    "rope": ((40, 300), (("reshape", 4, 5, 2, 300), ("transpose", 1, 2), ("reshape", 40, 300))),
    "rope inverse, sliced": (
        (80, 300),
        (("slice", 0, 40, 80), ("reshape", 4, 2, 5, 300), ("transpose", 1, 2), ("reshape", 40, 300)),
    ),
    "interleave then slice": (
        (40, 300),
        (("reshape", 40, 150, 2), ("transpose", 1, 2), ("reshape", 40, 300), ("slice", 1, 10, 170)),
    ),
    "3-D transpose": ((6, 40, 50), (("transpose", 1, 2),)),
    "large rows": ((3, 200, 100), (("transpose", 0, 2), ("slice", 1, 3, 160))),
    "one column": ((9000, 2), (("slice", 1, 1, 2),)),
    "scalar": ((), ()),
}


@pytest.mark.parametrize("target", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.usefixtures("small_chunks")
def test_views_and_regions(name: str, target: str, tmp_path: Path) -> None:
    """Two sources through the same views, side by side in one parameter; in one chunk or in many."""
    shape, views = VIEWS[name]
    size = int(np.prod(shape)) * 2
    data = random_bytes(100 + 2 * size)
    (tmp_path / "w").write_bytes(data)
    parts = []
    for index in range(2):
        stored = np.frombuffer(data, np.uint16, size // 2, 100 + index * size).reshape(shape)
        parts.append(torch.from_numpy(apply_views(stored, views).astype(np.int16)).view(torch.float16))
    if shape:
        expected = torch.cat(parts, dim=-1).to(getattr(torch, target))
        width = parts[0].shape[-1]
        rest = tuple((0, n) for n in parts[0].shape[:-1])
        regions: list[tuple[tuple[int, int], ...]] = [(*rest, (0, width)), (*rest, (width, 2 * width))]
        pieces = tuple(piece(100 + i * size, shape, views=views, region=regions[i]) for i in range(2))
    else:
        expected = parts[1].to(getattr(torch, target))
        pieces = (piece(102, shape),)
    unit = layout_unit("u", [TensorSource("a", target, tuple(expected.shape), pieces)])
    message = attach((unit,), tmp_path / "w")
    got = loaded(run(message, Load(0, 1), Load(0, 1)), unit.tensors[0], message.slot_offsets[1])
    assert got.shape == expected.shape
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())


def test_chunks_stay_within_the_bounce_buffer() -> None:
    """Large pieces are cut wherever their views allow it, and neighbours are read at once."""
    limit = 1 << 20
    big = TensorSource("big", "bfloat16", (50_000, 2000), (piece(4000, (2000, 50_000), views=(("transpose", 0, 1),)),))
    small = [TensorSource(f"small.{i}", "bfloat16", (64,), (piece(64 + 128 * i, (64,)),)) for i in range(8)]
    batches = plan_batches(layout_unit("u", [big, *small]), limit)
    assert max(batch.num_bytes for batch in batches) <= limit
    assert len(batches[0].chunks) > 8
    chunks = [chunk for batch in batches for chunk in batch.chunks if chunk.offset >= 4000]
    assert sum(chunk.num_bytes for chunk in chunks) == 2000 * 50_000 * 2
    assert all(
        b.offset <= c.offset and c.offset + c.num_bytes <= b.offset + b.num_bytes for b in batches for c in b.chunks
    )


def test_a_piece_too_large_to_cut_is_converted_in_one_go(tmp_path: Path, small_chunks: None) -> None:
    views: tuple[tuple[str | int, ...], ...] = (
        ("transpose", 0, 1),
        ("reshape", 300, 2, 50),
        ("slice", 1, 0, 1),
    )
    data = random_bytes(100 * 300 * 2)
    (tmp_path / "w").write_bytes(data)
    unit = layout_unit("u", [TensorSource("a", "float16", (300, 1, 50), (piece(0, (100, 300), views=views),))])
    assert plan_batches(unit, 16384)[0].num_bytes > 16384
    got = loaded(run(attach((unit,), tmp_path / "w"), Load(0, 0)), unit.tensors[0])
    expected = np.frombuffer(data, np.uint16).reshape(100, 300).T.reshape(300, 2, 50)[:, :1]
    assert torch.equal(got.view(torch.int16), torch.from_numpy(expected.astype(np.int16)))


def direct_unit(path: Path, count: int = 100_000) -> UnitSpec:
    path.write_bytes(random_bytes(count * 2))
    return layout_unit("u", [TensorSource("a", "float16", (count,), (piece(0, (count,)),))])


def test_file_that_changes_is_an_error(tmp_path: Path) -> None:
    unit = direct_unit(tmp_path / "w")
    message = attach((unit,), tmp_path / "w")
    state = LoaderState(message, mmap.mmap(-1, message.arena_bytes))
    state.load(Load(0, 0))
    os.truncate(tmp_path / "w", 1000)
    with pytest.raises(CheckpointError, match=r"w changed while it was in use \(200000 bytes at the start, 1000 now\)"):
        state.load(Load(0, 1))
    state.close()


def test_file_shorter_than_expected(tmp_path: Path) -> None:
    unit = direct_unit(tmp_path / "w")
    extent = replace(unit.extents[0], file_offset=409_600)
    message = attach((replace(unit, extents=(extent,)),), tmp_path / "w")
    with pytest.raises(CheckpointError, match="w has 200000 bytes, but weights are expected at 409600"):
        run(message, Load(0, 0))


def test_missing_file(tmp_path: Path) -> None:
    unit = direct_unit(tmp_path / "w")
    message = attach((unit,), tmp_path / "w")
    (tmp_path / "w").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="w cannot be opened"):
        run(message, Load(0, 0))


def test_read_error_names_file_and_offset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = direct_unit(tmp_path / "w")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(disk_reader.os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"w: reading 200704 bytes at 0 failed: Input/output error"):
        run(attach((unit,), tmp_path / "w"), Load(0, 0))


Preadv = Callable[[int, list[memoryview], int], int]


def without_direct_open(real_open: Callable[..., int], path: str, flags: int) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument")
    return real_open(path, flags)


@pytest.mark.parametrize("refuses", ["open", "read"])
def test_without_direct_reads(
    refuses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file system that refuses O_DIRECT, when the file is opened or when it is read."""
    unit = direct_unit(tmp_path / "w")
    monkeypatch.setattr(disk_reader, "_said_buffered", False)
    real_open, real_preadv, refused = os.open, os.preadv, []

    def preadv(descriptor: int, buffers: list[memoryview], position: int) -> int:
        if not refused:
            refused.append(position)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(descriptor, buffers, position)

    if refuses == "open":
        monkeypatch.setattr(disk_reader.os, "open", lambda path, flags: without_direct_open(real_open, path, flags))
    else:
        monkeypatch.setattr(disk_reader.os, "preadv", preadv)
    arena = run(attach((unit,), tmp_path / "w"), Load(0, 0), Load(0, 0))
    assert arena[:200_000] == (tmp_path / "w").read_bytes()
    assert len([record for record in caplog.records if "no direct reads" in record.message]) == 1


def test_short_and_interrupted_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = direct_unit(tmp_path / "w")
    real, calls = os.preadv, []

    def preadv(descriptor: int, buffers: list[memoryview], position: int) -> int:
        calls.append(position)
        if len(calls) % 3 == 0:
            raise InterruptedError
        return real(descriptor, [buffers[0][:20_480]], position) - (1000 if len(calls) % 2 else 0)

    monkeypatch.setattr(disk_reader.os, "preadv", preadv)
    arena = run(attach((unit,), tmp_path / "w"), Load(0, 0))
    assert arena[:200_000] == (tmp_path / "w").read_bytes()
    assert len(calls) > 10
    assert all(position % 4096 == 0 for position in calls)


def test_slot_too_small(tmp_path: Path) -> None:
    unit = direct_unit(tmp_path / "w")
    message = replace(attach((unit,), tmp_path / "w"), arena_bytes=8192)
    with pytest.raises(ValueError, match="does not fit"):
        run(message, Load(0, 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dummy_weights(dtype: str) -> None:
    sources = [
        TensorSource("q.weight", dtype, (3000, 2000), ()),
        TensorSource("k.weight", dtype, (3000, 2000), ()),
        TensorSource("norm.weight", dtype, (2000,), ()),
        TensorSource("q.bias", dtype, (2000,), ()),
        TensorSource("count", "int64", (3,), ()),
    ]
    units = (layout_unit("u", sources), layout_unit("v", sources))
    message = attach(units, "", "dummy")
    arena = run(message, Load(0, 0), Load(0, 1))
    weight, other, norm, bias, count = (loaded(arena, tensor) for tensor in units[0].tensors)
    assert abs(weight.float().std().item() - 0.02) < 0.0005
    assert abs(weight.float().mean().item()) < 0.0005
    assert weight.abs().max() <= 0.0348
    assert not torch.equal(weight, other)
    assert not torch.equal(weight[0], weight[1])
    assert (norm == 1).all() and (bias == 0).all() and (count == 0).all()
    for index, tensor in enumerate(units[0].tensors):
        again = loaded(arena, tensor, message.slot_offsets[1])
        assert torch.equal(again, (weight, other, norm, bias, count)[index])
    arena = run(message, Load(1, 0))
    assert not torch.equal(loaded(arena, units[1].tensors[0]), weight)


def test_light_imports() -> None:
    """Reading without casts needs neither torch nor numba."""
    program = (
        "import sys, flexgen_lite.workers.loader.state\n"
        "print([name for name in ('torch', 'numba') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_view_is_refused() -> None:
    with pytest.raises(ValueError, match="flip"):
        bounce_plan.apply_views(np.zeros(3, np.uint16), (("flip", 0),))


def test_direct_reads_that_are_refused_to_several_threads_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system opens with O_DIRECT and does not read so: whichever thread finds out first."""
    real_preadv = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        time.sleep(0.001)
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            time.sleep(random.random() / 200)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(disk_reader.os, "preadv", preadv)
    monkeypatch.setattr(disk_reader, "READ_BYTES", 8192)
    monkeypatch.setattr(loader_state, "split_order", lambda order: disk_reader.split_order(order, 8192))
    unit = direct_unit(tmp_path / "w")
    for _ in range(10):
        run(attach((unit,), tmp_path / "w"), Load(0, 0))

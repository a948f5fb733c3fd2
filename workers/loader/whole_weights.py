"""Weights in few bits that cannot be kept so, in float32: those of a router or an embedding, say, that are read by more
than a product. They are put together as they would be in memory, and unpacked there; all of one at a time."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from flexgen_lite.model.packing import COLUMNS, TABLES, Packing, num_blocks
from flexgen_lite.model.spec import PartOfWhole, StoredPart
from flexgen_lite.workers.loader.float_items import E4M3, to_float32
from flexgen_lite.workers.loader.lines import Lines
from flexgen_lite.workers.loader.stored_bits import ChunkOfBits
from flexgen_lite.workers.loader.stored_layouts import num_lines
from flexgen_lite.workers.loader.weight_cast import Bits
from flexgen_lite.workers.loader.weight_packing import PackedTensor

_DTYPE = "bfloat16"  # that strides are counted in; no item has it


def floats_of_whole(lines: Lines) -> Bits:
    """`[N, K]`; the lines are all bytes of its values."""
    part, packing, columns, width = lines.part, lines.part.packing, len(lines.bytes), lines.width
    assert packing is not None
    memory, others = np.zeros(packing.num_bytes((columns, width)), np.uint8), list(lines.others)
    source, dtype = lines.bytes.reshape(-1), lines.dtype
    for number, member in enumerate(part.members):
        if number:
            source, dtype = others.pop(0).view(np.uint8), member.dtype
        own = tuple(others.pop(0) for _ in range(member.num_others))
        _chunk(member, source, dtype, own, packing, (columns, width)).convert(source, 0, memory, 0)  # type: ignore[arg-type]
    return _unpacked(memory, packing, columns, width)


def _chunk(
    member: PartOfWhole,
    source: Bits,
    dtype: str,
    others: tuple[Bits, ...],
    packing: Packing,
    shape: tuple[int, int],
) -> ChunkOfBits:
    """All of one part."""
    part = StoredPart(member.fills, member.layout, member.num_bits, member.block, number=member.number)
    return ChunkOfBits(
        file=0, offset=0, num_bytes=source.size, dtype=dtype, part=part, num_lines=num_lines(part, *shape),
        num_rows=shape[0], skipped=0, first=0, begin=0, row=0, shape=shape[:1], strides=(2 * shape[1],),
        packed=PackedTensor(packing, _DTYPE, shape, 0), others=others,
        locks=tuple(threading.Lock() for _ in range(4)), name="",
    )  # fmt: skip


def _unpacked(memory: Bits, packing: Packing, columns: int, width: int) -> Bits:
    shape = (columns, width)
    blocks, groups, middle = num_blocks(columns), width // packing.group, 8 if packing.bits == 4 else 128

    def by_column(start: int, dtype: str, of_row: int = groups) -> Bits:
        items = _numbers(memory[start : start + blocks * COLUMNS * of_row * _size(dtype)], dtype)
        return np.asarray(items.reshape(blocks, of_row, COLUMNS).swapaxes(1, 2).reshape(-1, of_row, 1)[:columns])

    def factors(start: int) -> Bits:
        of_row = width // packing.factor_group
        return np.repeat(by_column(start, packing.factors, of_row), groups // of_row, axis=1)

    codes = _codes(memory[: packing.scales_at(shape)], packing, blocks)[:columns].reshape(columns, groups, -1)
    if packing.kind == "int":
        values = codes.astype(np.float32)
        values -= by_column(packing.zeros_at(shape), "uint8") if packing.has_zeros else np.float32(middle)
    else:
        values = (E4M3 if packing.kind == "e4m3" else np.array(TABLES[packing.kind], np.float32))[codes]
    scales = by_column(packing.scales_at(shape), packing.scale_dtype)
    if packing.factors:
        factor = factors(packing.factors_at(shape))
        scales = scales / factor if packing.divides else scales * factor
    values *= scales
    if packing.finish == "127":
        values *= np.float32(1 / 127)
    elif packing.finish == "float16":
        values = values.astype(np.float16).astype(np.float32)
    if packing.zeros == "float32":
        values += by_column(packing.zeros_at(shape), "float32")
    elif packing.zeros == "scaled":
        values -= by_column(packing.zeros_at(shape), "uint8") * factors(packing.lows_at(shape))
    rows = values.reshape(columns, width)
    if not packing.is_sorted:
        return rows
    found = np.empty_like(rows)
    found[:, memory[packing.order_at(shape) :].view(np.int32)] = rows
    return found


def _codes(values: Bits, packing: Packing, blocks: int) -> Bits:
    """In the order for int8, `[columns of all blocks, K]`."""
    if packing.bits == 8:
        return np.asarray(values.reshape(blocks, -1, COLUMNS, 4).swapaxes(1, 2).reshape(blocks * COLUMNS, -1))
    words = values.reshape(blocks, -1, COLUMNS, 1, 4)
    halves = np.concatenate((words & 15, words >> 4), axis=3)
    return np.asarray(halves.swapaxes(1, 2).reshape(blocks * COLUMNS, -1))


def _size(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}.get(dtype, 1)


def _numbers(items: Bits, dtype: str) -> Any:
    if dtype in ("uint8", "int8"):
        return items.view(dtype).astype(np.float32)
    return to_float32(items, dtype)

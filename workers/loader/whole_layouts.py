"""Layouts whose lines are all of a weight's rows: GGUF's blocks, which have their scales in them, and what is unpacked
while it is loaded because the model cannot keep it in few bits (stored_layouts.py has the table of all).
"""

from __future__ import annotations

import numpy as np

from flexgen_lite.model.formats.gguf import ADDED
from flexgen_lite.model.formats.gguf_header import TYPES
from flexgen_lite.model.spec import ITEM_BYTES
from flexgen_lite.workers.loader.float_items import E4M3, to_float32
from flexgen_lite.workers.loader.lines import Layout, Lines
from flexgen_lite.workers.loader.weight_cast import Bits


def _blocks(lines: Lines) -> dict[str, Bits]:
    from flexgen_lite.workers.loader import gguf_kernels

    return gguf_kernels.decode(lines.part.layout, lines.words(np.uint16), lines.width)


def _floats_of_blocks(lines: Lines) -> Bits:
    rows, items = lines.part.block
    source = lines.part.others[0]
    scales = to_float32(lines.others[0].view(np.uint8).reshape(1, -1), source.dtype).reshape(
        -1, -(-lines.width // items)
    )
    place = (lines.first + np.arange(len(lines.bytes))) // rows
    return np.asarray(E4M3[lines.bytes] * np.repeat(scales[place], items, axis=1)[:, : lines.width])


def floats(lines: Lines) -> Bits:
    """Rows of float32 of lines whose part is all."""
    if lines.part.layout == "fp8_blocks":
        return _floats_of_blocks(lines)
    if lines.part.layout == "whole":
        from flexgen_lite.workers.loader.whole_weights import floats_of_whole

        return floats_of_whole(lines)
    if lines.part.layout == ADDED:
        return np.asarray(to_float32(lines.bytes, lines.dtype) + np.float32(lines.part.number))
    from flexgen_lite.workers.loader import gguf_kernels

    rows: Bits = gguf_kernels.floats(lines.part.layout, lines.words(np.uint16), lines.width)
    return rows


_BLOCKS = {kind.name.lower(): kind for kind in TYPES.values() if kind.items > 1}
WHOLE = {
    name: Layout(_blocks, lambda part, n, k, dtype: k // part.block[1] * _BLOCKS[part.layout].num_bytes)
    for name in _BLOCKS
}
WHOLE["whole"] = Layout(floats, lambda part, n, k, dtype: 1)  # they are read all at once
WHOLE["fp8_blocks"] = Layout(floats, lambda part, n, k, dtype: k)
WHOLE[ADDED] = Layout(floats, lambda part, n, k, dtype: k * ITEM_BYTES[dtype])

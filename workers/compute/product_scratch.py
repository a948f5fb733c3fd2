"""How a segment's rows go in passes, and where things lie in a thread's scratch memory."""

from __future__ import annotations

from typing import Any, NamedTuple

from flexgen_lite.workers.compute.product_bytes import GROUP_FIELDS, SCALES_BYTES
from flexgen_lite.workers.compute.product_panels import BYTES4, BYTES8, PACKED, kernel
from flexgen_lite.workers.compute.product_tiles import COLUMNS, ROW, STEP, WORD_BYTES
from flexgen_lite.workers.simd import LANES

PASS_ROWS = 6  # at most; 7 would leave no registers for weights and words


@kernel
def num_passes(rows):  # type: ignore[no-untyped-def]
    return (rows + PASS_ROWS - 1) // PASS_ROWS


@kernel
def first_row(rows, passes, turn):  # type: ignore[no-untyped-def]
    """Of pass `turn`; passes differ by a row at most, the longer ones come first."""
    return turn * (rows // passes) + min(turn, rows % passes)


class Scratch(NamedTuple):
    words: int  # packed rows, and what is written behind them
    numbers: int  # of rows that are rounded to bytes
    sums: int
    line: int  # rows that are gathered or rounded, words that are turned, scales of a chunk, a block's last columns
    panel: int
    end: int


def scratch(base: int, rows: int, steps: int, chunk: int, storage: int, group: int, tiles: int) -> Scratch:
    """For so many rows; `base` is a multiple of 64, and so are all of these.

    Args:
        steps: of two items of K.
        chunk: steps of a panel.
        group: items of K with one scale; 0: there are no scales.
        tiles: 0: the products are those of vectors.
    """
    rows = (rows + 15) // 16 * 16
    groups = 2 * steps // group if group else 0
    panel_bytes = 0 if storage == PACKED else max(chunk * STEP, group * COLUMNS)
    scales = (2 * chunk // group + 1) * SCALES_BYTES if group else 0
    word_bytes = 4 if tiles != 0 or storage in (BYTES8, BYTES4) else WORD_BYTES
    numbers = base + word_bytes * rows * steps + (PASS_ROWS + 1) * ROW
    sums = numbers + 4 * GROUP_FIELDS * rows * groups
    line = sums + 4 * rows * COLUMNS
    panel = line + max(PASS_ROWS * 4 * steps + ROW, LANES * ROW, scales) + ROW
    return Scratch(base, numbers, sums, line, panel, panel + panel_bytes)


scratch_at: Any = kernel(scratch)

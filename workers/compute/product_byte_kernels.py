"""What product_kernels.py does in whole numbers (see product_bytes.py): a segment's rows with a block of columns.

Rows are taken in passes of as many as the registers hold sums for. Of a pass, packed rows are `[step][row]` words, and
the numbers of its groups `[group][field][row]`.
"""

from __future__ import annotations

from flexgen_lite.workers import simd
from flexgen_lite.workers.compute import product_bytes as ops
from flexgen_lite.workers.compute.product_bytes import GROUP_FIELDS, SCALES_BYTES
from flexgen_lite.workers.compute.product_panels import BYTES4, kernel
from flexgen_lite.workers.compute.product_scratch import first_row, num_passes
from flexgen_lite.workers.compute.product_tiles import COLUMNS
from flexgen_lite.workers.compute.scale_loads import at_place, factor_place, scale_bytes

if simd.BYTES:
    _tile_1, _tile_2, _tile_3, _tile_4, _tile_5, _tile_6 = (ops.byte_tile(rows) for rows in range(1, 7))

    @kernel
    def _multiply_tile(rows, words, weights, scales, zeros, numbers, groups, steps, sums, keep, ahead, lines):  # type: ignore[no-untyped-def]
        if rows == 1:
            _tile_1(words, weights, scales, zeros, numbers, groups, steps, sums, keep, ahead, lines)
        elif rows == 2:
            _tile_2(words, weights, scales, zeros, numbers, groups, steps, sums, keep, ahead, lines)
        elif rows == 3:
            _tile_3(words, weights, scales, zeros, numbers, groups, steps, sums, keep, ahead, lines)
        elif rows == 4:
            _tile_4(words, weights, scales, zeros, numbers, groups, steps, sums, keep, ahead, lines)
        elif rows == 5:
            _tile_5(words, weights, scales, zeros, numbers, groups, steps, sums, keep, ahead, lines)
        else:
            _tile_6(words, weights, scales, zeros, numbers, groups, steps, sums, keep, ahead, lines)

else:

    @kernel
    def _multiply_tile(rows, words, weights, scales, zeros, numbers, groups, steps, sums, keep, ahead, lines):  # type: ignore[no-untyped-def]
        pass


@kernel
def round_row(call, source, target, numbers, rows):  # type: ignore[no-untyped-def]
    """A row of x to bytes, and the numbers of its groups to `numbers`, of a pass of `rows` rows."""
    middle = 8 if call.storage == BYTES4 else 128
    for group in range(2 * call.steps // call.group):
        first = group * call.group
        at = numbers + 4 * group * GROUP_FIELDS * rows
        ops.round_group(source + 2 * first, call.group, middle, target + first, at, 4 * rows)


@kernel
def multiply_in_bytes(call, weight, block, following, num_rows, scratch):  # type: ignore[no-untyped-def]
    """A block with `num_rows` rows; `following` is what will be read next."""
    passes = num_passes(num_rows)
    at = call.weights + weight * call.weight_bytes + block * call.steps * call.step_bytes
    width = 2 * call.steps
    blocks, groups = (call.columns + COLUMNS - 1) // COLUMNS, width // call.group
    steps = call.group // 4  # of a group
    group_bytes = call.group // 2 * call.step_bytes
    chunk = max(1, 2 * call.chunk // call.group)  # groups
    for first in range(0, groups, chunk):
        last = min(first + chunk, groups)
        stored = at + first * group_bytes
        ahead = at + last * group_bytes if last < groups else following
        panel = stored
        for group in range(first, last):
            place = ((weight * blocks + block) * groups + group) * COLUMNS
            factor = factor_place(call, weight * blocks + block, group * call.group, width)
            ops.load_line(
                call.scales + place * scale_bytes(call.scale_kind), call.scale_kind,
                at_place(call.zeros, place, 1), call.zero_bytes,
                at_place(call.factors, factor, call.factor_bytes), call.factor_bytes, call.divides,
                8 if call.storage == BYTES4 else 128, scratch.line + (group - first) * SCALES_BYTES,
            )  # fmt: skip
        if call.storage == BYTES4:
            panel = scratch.panel
            ops.unpack_halves(stored, (last - first) * call.group // 8, panel, ahead)
        lines = 0 if call.storage == BYTES4 or passes == 1 else (call.group + passes - 1) // passes
        for turn in range(passes):
            row = first_row(num_rows, passes, turn)
            rows = first_row(num_rows, passes, turn + 1) - row
            words = scratch.words + row * width + 4 * rows * first * steps
            numbers = scratch.numbers + 4 * GROUP_FIELDS * (row * groups + rows * first)
            sums, keep = scratch.sums + 4 * row * COLUMNS, 0 if first == 0 else 1
            _multiply_tile(
                rows, words, panel, scratch.line, call.zeros, numbers, last - first, steps, sums, keep, ahead, lines
            )
            ahead += (last - first) * lines * 64

"""How weights of 8 and 4 bits lie in memory: blocks of columns in the order of the kernels that multiply with them.

A weight `[N, K]` has whole numbers q and, for every `group` items of K of a column n, a scale and perhaps a zero:
w = (q - zero) * scale. Of several weights `[E, N, K]`, the values of all come first, then the scales of all, then the
zeros of all. N is filled up to whole blocks of COLUMNS.

    order       bits  values of a block
    bfloat16       8  [K / 8][column][2][4]     byte i of word p: q[8 s + 2 i + p], two's complement
    bfloat16       4  [K / 16][column][2]       half byte i of word p: q[16 s + 2 i + p] + 8
    int8           8  [K / 4][column][4]        byte i: q[4 s + i] + 128
    int8           4  [K / 8][column][4]        byte i: q[8 s + i] + 8, and above it q[8 s + 4 + i] + 8

Scales are `[block][K / group][column]`; so are zeros, a byte each: zero + 8, or + 128 where q has 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = 64  # of a block
STEP = 16  # items of K in which groups are counted
SCALE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Packing:
    """
    Attributes:
        group: items of K with one scale.
        order: of the values, see above.
        is_transposed: the model has the weight as `[K, N]`.
        rounds_rows: rows that the weight is multiplied with are rounded to 8 bits, group by group.
    """

    bits: int
    group: int
    order: str
    scale_dtype: str
    has_zeros: bool = False
    is_transposed: bool = False
    rounds_rows: bool = False

    def dimensions(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """E, N and K of a parameter's shape; E is 1 for a single weight."""
        *count, columns, width = shape if not self.is_transposed else (*shape[:-2], shape[-1], shape[-2])
        return (count[0] if count else 1), columns, width

    def value_bytes(self, shape: tuple[int, ...]) -> int:
        """Of one of the weights."""
        _, columns, width = self.dimensions(shape)
        return num_blocks(columns) * COLUMNS * width * self.bits // 8

    def num_scales(self, shape: tuple[int, ...]) -> int:
        """Of one of the weights."""
        _, columns, width = self.dimensions(shape)
        return num_blocks(columns) * COLUMNS * (width // self.group)

    def scales_at(self, shape: tuple[int, ...]) -> int:
        """Where the scales begin, in bytes."""
        return self.dimensions(shape)[0] * self.value_bytes(shape)

    def zeros_at(self, shape: tuple[int, ...]) -> int:
        """Where the zeros begin, in bytes, if there are any."""
        count = self.dimensions(shape)[0] * self.num_scales(shape)
        return self.scales_at(shape) + count * SCALE_BYTES[self.scale_dtype]

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Of all of it."""
        zeros = self.dimensions(shape)[0] * self.num_scales(shape) if self.has_zeros else 0
        return self.zeros_at(shape) + zeros


def num_blocks(columns: int) -> int:
    return -(-columns // COLUMNS)


def fitting_groups(width: int, most: int = 128) -> list[int]:
    """The sizes of groups up to `most` that divide `width`."""
    return [size for size in range(STEP, min(width, most) + 1, STEP) if width % size == 0]

"""How weights of 8 and 4 bits lie in memory: blocks of columns in the order of the kernels that multiply with them.

A weight `[N, K]` has a code for each item and, for every `group` items of K of a column n, a scale and perhaps a zero
or an offset. Scales of one byte may have a factor in common, for every `factor_group` items of a column, and so may
offsets. The *kind* says what a code's value is:

    int      q, a whole number with a sign:  w = (q - zero) * scale
    uint     4 bits without a sign
    e2m1, nf4, fp4   4 bits, a place in one of TABLES
    e4m3     8 bits, a number in floating point

and w = value * scale + offset, rounded once; some formats do more to the product first, see `finish`. Of several
weights `[E, N, K]`, the codes of all come first, then the scales of all, then the zeros or offsets of all, the factors
of all scales, and those of all offsets. N is filled up to whole blocks of COLUMNS.

Where groups are no runs of inputs, the inputs are sorted by them: item p of K is then that of input `order[p]`, and
behind all the rest are these numbers, int32 `[E, K]`.

    order       bits  codes of a block
    bfloat16       8  [K / 8][column][2][4]     byte i of word p: that of item 8 s + 2 i + p; q in two's complement
    bfloat16       4  [K / 16][column][2]       half byte i of word p: that of item 16 s + 2 i + p; q + 8
    int8           8  [K / 4][column][4]        byte i: item 4 s + i; q + 128
    int8           4  [K / 8][column][4]        byte i: item 8 s + i, and above it item 8 s + 4 + i; q + 8

Scales are `[block][K / group][column]`; so are zeros, a byte each: zero + 8, or + 128 where q has 8 bits; and offsets,
in float32, or a byte each that is multiplied with its factor and subtracted. Factors are `[block][K / factor_group]
[column]`.
"""

from __future__ import annotations

from dataclasses import dataclass

COLUMNS = 64  # of a block
STEP = 16  # items of K in which groups are counted
SCALE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4} | dict.fromkeys(
    ("float8_e4m3fn", "float8_e8m0fnu", "uint8", "int8"), 1
)
ZERO_BYTES = {"": 0, "uint8": 1, "scaled": 1, "float32": 4}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TABLES: dict[str, tuple[float, ...]] = {
    "int": tuple(float(code - 8) for code in range(16)),
    "uint": tuple(float(code) for code in range(16)),
    "e2m1": (*_E2M1, *(-value for value in _E2M1)),
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        -0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}  # fmt: skip
"""What codes of 4 bits stand for: bitsandbytes' nf4 and fp4, and E2M1 (OCP Microscaling Formats)."""


@dataclass(frozen=True, slots=True)
class Packing:
    """
    Attributes:
        group: items of K with one scale.
        order: of the codes, see above.
        scale_dtype: "uint8" and "int8" are whole numbers.
        zeros: "uint8": there are zeros; "float32": there are offsets; "scaled": there are, in bytes; "": neither.
        is_transposed: the model has the weight as `[K, N]`.
        rounds_rows: rows that the weight is multiplied with are rounded to 8 bits, group by group.
        kind: of the codes.
        is_sorted: inputs are sorted by their groups.
        finish: "float16": the product of value and scale is rounded to float16 first; "127": scales are 127 times what
            they are, and the product is multiplied with 1 / 127 in float32. Where order is "int8" and rows are rounded,
            there is no such product: "float16" has no effect.
        factors: the dtype of factors, float32 or float16; "": there are none.
        factor_group: items of K with one factor.
        divides: scales are divided by their factor, not multiplied.
    """

    bits: int
    group: int
    order: str
    scale_dtype: str
    zeros: str = ""
    is_transposed: bool = False
    rounds_rows: bool = False
    kind: str = "int"
    is_sorted: bool = False
    finish: str = ""
    factors: str = ""
    factor_group: int = 0
    divides: bool = False

    @property
    def has_zeros(self) -> bool:
        """Whether there are zeros, whole numbers as the codes are."""
        return self.zeros == "uint8"

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
        """Where the zeros or offsets begin, in bytes, if there are any."""
        count = self.dimensions(shape)[0] * self.num_scales(shape)
        return self.scales_at(shape) + count * SCALE_BYTES[self.scale_dtype]

    def num_factors(self, shape: tuple[int, ...]) -> int:
        """Of the scales of one of the weights."""
        _, columns, width = self.dimensions(shape)
        return num_blocks(columns) * COLUMNS * (width // self.factor_group) if self.factors else 0

    def factors_at(self, shape: tuple[int, ...]) -> int:
        """Where the factors of scales begin, in bytes, if there are any."""
        count = self.dimensions(shape)[0] * self.num_scales(shape)
        return self.zeros_at(shape) + count * ZERO_BYTES[self.zeros]

    def lows_at(self, shape: tuple[int, ...]) -> int:
        """Where the factors of offsets begin, in bytes, if there are any."""
        count = self.dimensions(shape)[0] * self.num_factors(shape)
        return self.factors_at(shape) + (count * SCALE_BYTES[self.factors] if count else 0)

    def order_at(self, shape: tuple[int, ...]) -> int:
        """Where the numbers of the inputs begin, in bytes, if there are any."""
        lows = self.lows_at(shape)
        return lows + (lows - self.factors_at(shape) if self.zeros == "scaled" else 0)

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Of all of it."""
        count, _, width = self.dimensions(shape)
        return self.order_at(shape) + (4 * count * width if self.is_sorted else 0)


def num_blocks(columns: int) -> int:
    return -(-columns // COLUMNS)


def fitting_groups(width: int, most: int = 128) -> list[int]:
    """The sizes of groups up to `most` that divide `width`."""
    return [size for size in range(STEP, min(width, most) + 1, STEP) if width % size == 0]

"""Small arrays of floats in any of the formats that scales are stored in, as float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flexgen_lite.workers.loader.weight_cast import Bits, bits_type

Floats = npt.NDArray[np.float32]


def _e4m3() -> Floats:
    """Values of all bytes: a sign, four bits of exponent with bias 7, three of mantissa; 127 is no number."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    size[(code & 127) == 127] = np.nan
    return np.where(code & 128, -size, size).astype(np.float32)


E4M3 = _e4m3()


def _e8m0() -> Floats:
    """Powers of two; 255 is no number."""
    return np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan)).astype(np.float32)


E8M0 = _e8m0()


def to_float32(lines: Bits, dtype: str) -> Floats:
    """Rows of bytes `[rows, bytes]` as rows of what they hold."""
    if dtype == "float8_e4m3fn":
        return E4M3[lines]
    if dtype in ("float8_e8m0fnu", "uint8"):  # a power of two
        return E8M0[lines]
    items = np.ascontiguousarray(lines).view(bits_type(dtype))
    if dtype == "bfloat16":
        return (items.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return items.view({"float16": np.float16, "float32": np.float32}[dtype]).astype(np.float32)


def from_float32(items: Floats, dtype: str) -> Bits:
    """Bits of `items` in float32, bfloat16 (which they must fit) or float16 (likewise)."""
    if dtype == "float32":
        return np.ascontiguousarray(items).view(np.uint32)
    if dtype == "bfloat16":
        return (np.ascontiguousarray(items).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return items.astype(np.float16).view(np.uint16)

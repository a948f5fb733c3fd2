"""Copying and casting weights with NumPy. Arrays hold the elements' bits: unsigned integers of their size."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flexgen_lite.model.spec import ITEM_BYTES

Bits = npt.NDArray[Any]

_BITS: dict[int, type[np.unsignedinteger[Any]]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_FLOATS = frozenset(("float32", "bfloat16", "float16"))
_SHIFT_ELEMENTS = 1 << 17  # what fits the L2 cache: NumPy's widening shift makes a temporary


def bits_type(dtype: str) -> type[np.unsignedinteger[Any]]:
    return _BITS[ITEM_BYTES[dtype]]


def copy_cast(source: Bits, source_dtype: str, target: Bits, target_dtype: str) -> None:
    """`target[...] = source`, cast to nearest even. The shapes are equal; the target may be strided."""
    if source_dtype == target_dtype:
        np.copyto(target, source)
        return
    if not {source_dtype, target_dtype} <= _FLOATS:
        raise ValueError(f"no cast from {source_dtype} to {target_dtype}")
    flat = np.ascontiguousarray(source).reshape(-1)
    if target.flags.c_contiguous:
        _cast(flat, source_dtype, target.reshape(-1), target_dtype)
        return
    result = np.empty(target.size, target.dtype)
    _cast(flat, source_dtype, result, target_dtype)
    np.copyto(target, result.reshape(target.shape))


def _cast(source: Bits, source_dtype: str, target: Bits, target_dtype: str) -> None:
    if (source_dtype, target_dtype) == ("bfloat16", "float32"):
        for start in range(0, source.size, _SHIFT_ELEMENTS):
            part = slice(start, start + _SHIFT_ELEMENTS)
            np.left_shift(source[part], 16, out=target[part], dtype=np.uint32)
        return
    # numba takes 100 MB and half a second: only a process that casts pays for it.
    from flexgen_lite.workers.loader.cast_kernels import KERNELS

    KERNELS[source_dtype, target_dtype](source, target)

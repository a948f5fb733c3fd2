"""Blocks of GGUF on their way into memory: as the plain formula of each type has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flexgen_lite.model.packing import TABLES
from flexgen_lite.workers.loader import gguf_kernels
from tests.gguf_file import BLOCKS, Array, blocks

KINDS = sorted(BLOCKS)


def weight_of(columns: int, width: int) -> Array:
    rng = np.random.default_rng(columns)
    return (rng.standard_normal((columns, width)) * rng.uniform(0.01, 3, (columns, 1))).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_floats(kind: str) -> None:
    weight = weight_of(7, 512)
    data, exact = blocks(kind, weight)
    assert np.abs(exact - weight).max() < 0.3 * np.abs(weight).max()
    got = gguf_kernels.floats(kind.lower(), data.view(np.uint16), 512)
    assert np.array_equal(got, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_scales_and_offsets(kind: str) -> None:
    """Together they are the weight; codes are whole numbers in the form that the order of packing.py wants."""
    data, exact = blocks(kind, weight_of(5, 768))
    found = gguf_kernels.decode(kind.lower(), data.view(np.uint16), 768)
    code_bytes = found["values"].view(np.uint8)
    has_offsets = "offsets" in found or "lows" in found
    if kind.startswith("Q4"):
        values = np.stack((code_bytes & 15, code_bytes >> 4), -1).reshape(5, 768)
        numbers = np.array(TABLES["uint" if has_offsets else "int"], np.float32)[values]
    else:
        numbers = code_bytes.astype(np.float32) - 128
    scales = found["scales"]
    if "factors" in found:
        whole = (scales.view(np.int8) if kind == "Q6_K" else scales).astype(np.float32)
        scales = whole * _spread(found["factors"], whole)
    else:
        scales = scales.view(np.float16).astype(np.float32)
    weight = numbers * _spread(scales, numbers)
    if "lows" in found:
        weight -= _spread(found["zeros"].astype(np.float32) * _spread(found["lows"], found["zeros"]), numbers)
    elif has_offsets:
        weight += _spread(found["offsets"], numbers)
    assert np.array_equal(weight, exact)


def _spread(items: Any, like: Any) -> Any:
    """An item for each of `like`, float16 as float32."""
    items = items if items.dtype == np.float32 else items.view(np.float16).astype(np.float32)
    return np.repeat(items, like.shape[1] // items.shape[1], axis=1)

"""Blocks of GGUF on their way into memory: as the plain formula of each type has them."""

from __future__ import annotations

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
    codes, scales, *offsets = gguf_kernels.decode(kind.lower(), data.view(np.uint16), 768)
    code_bytes = codes.view(np.uint8)
    if kind.startswith("Q4"):
        values = np.stack((code_bytes & 15, code_bytes >> 4), -1).reshape(5, 768)
        numbers = np.array(TABLES["uint" if offsets else "int"], np.float32)[values]
    else:
        numbers = code_bytes.astype(np.float32) - 128
    factors = scales if scales.dtype == np.float32 else scales.view(np.float16).astype(np.float32)
    group = 768 // factors.shape[1]
    found = numbers * np.repeat(factors, group, axis=1)
    found = found + np.repeat(offsets[0], group, axis=1) if offsets else found
    assert np.array_equal(found, exact)

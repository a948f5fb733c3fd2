"""Has the attention kernels at hand before there is anything to attend to: compiled, or from numba's cache."""

from __future__ import annotations

import numpy as np

from flexgen_lite.memory.kv_layout import KV_ITEM_BYTES
from flexgen_lite.workers.attention import kernels, layout
from flexgen_lite.workers.attention.state import KINDS, check_dtypes
from flexgen_lite.workers.kernel_cache import from_cache

_SHAPE = layout.Shape(
    num_heads=1, num_kv_heads=1, head_dim=8, value_dim=8, key_order=8, value_order=8, page_bytes=2048, page_shift=4,
    window=0, attention_chunk=0, has_sinks=True, values_in_keys=False,
    scaling=np.float32(1), softcap=np.float32(0), keys=0, values=1024, q=0, k=64, v=128, out=192, sinks=256,
)  # fmt: skip


def warm_up(dtype: str, kv_dtype: str) -> None:
    """Runs each kernel once. Where they are not in the cache they are compiled, which takes some seconds."""
    check_dtypes(dtype, kv_dtype)
    from_cache(lambda: _run(dtype, kv_dtype), f"attention-{dtype}-{kv_dtype}")


def _run(dtype: str, kv_dtype: str) -> None:
    """On a token, in memory of its own."""
    per_word, kind, kept = 4 // KV_ITEM_BYTES[kv_dtype], KINDS[dtype], KINDS[kv_dtype]
    region, kv = np.zeros(320, np.uint8), np.zeros(2048, np.uint8)
    pages, counter = np.zeros(1, np.int64), np.zeros(1, np.int64)
    pieces = np.array([[0, 1, 0, 0]], np.int64)
    units = np.array([[0, 0, 0, 0, 1, 0, 1, 0, 1]], np.int64)
    joins = np.array([[0, 1]], np.int64)
    partials = np.zeros(layout.partial_bytes(8, per_word), np.uint8)
    memory = np.zeros(layout.places(0, 8, 8, per_word, False).end + 64, np.uint8)
    scratch = -(-memory.ctypes.data // 64) * 64
    here, at = region.ctypes.data, counter.ctypes.data
    kernels.store(kv.ctypes.data, here, pages, pieces, _SHAPE, scratch, at, kind, kept)
    counter[0] = 0
    kernels.attend(kv.ctypes.data, here, pages, units, _SHAPE, scratch, partials.ctypes.data, at, kind, kept)
    counter[0] = 0
    kernels.join(here, units, joins, _SHAPE, scratch, partials.ctypes.data, at, kind, kept)

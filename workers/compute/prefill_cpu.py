"""Prefill attention on the CPU: hands a micro-batch's prompts to the kernel, on the threads that PyTorch has anyway.

A second team of threads would compete with PyTorch's, which spin for a while after every operation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexgen_lite.workers.compute import prefill_kernels as kernels
from flexgen_lite.workers.compute.attention_call import AttentionCall
from flexgen_lite.workers.simd import PAIRS_PAY

DTYPES = (torch.float32, torch.bfloat16)
NO_WINDOW = 1 << 30
_ALIGN = 64


_scratch, _scratch_address = np.empty(0, np.uint8), 0


def prepare(dtype: torch.dtype) -> None:
    """Loads the kernel for `dtype` and an even head size, or compiles it."""
    if parallel() is not None and dtype in DTYPES:
        _ = kernels.compiled(_choose(dtype, 2)[0])


def serves(call: AttentionCall) -> bool:
    # The kernel finds the largest score before it scales them.
    return parallel() is not None and call.query_BHTD.dtype in DTYPES and 1e-6 < call.scaling < 1e6


def attend(call: AttentionCall, spans: Sequence[tuple[int, int]], out_THE: torch.Tensor) -> None:
    """See prefill_attention.prompt_attention; for a call that it serves."""
    assert out_THE.is_contiguous()
    q_HTD, k_GTD, v_GTE = (_with_whole_rows(x[0]) for x in (call.query_BHTD, call.key_BGTD, call.value_BGTE))
    heads, num_rows, depth = q_HTD.shape
    groups, _, columns = v_GTE.shape
    function, items = _choose(q_HTD.dtype, depth)
    longest_first = np.array(sorted(spans, key=lambda span: -span[1]), dtype=np.int64).reshape(-1, 2)
    counters = np.zeros(kernels.COUNTERS, dtype=np.int64)
    sinks_H = None if call.sinks_H is None else call.sinks_H.float().contiguous()
    threads = torch.get_num_threads()
    record = np.zeros(1, dtype=kernels.CALL)
    record[0] = (
        q_HTD.data_ptr(), k_GTD.data_ptr(), v_GTE.data_ptr(), out_THE.data_ptr(),
        0 if sinks_H is None else sinks_H.data_ptr(), longest_first.ctypes.data,
        scratch_address(threads * kernels.places(0, depth // items, columns).end), counters.ctypes.data,
        *_strides(q_HTD), *_strides(k_GTD), *_strides(v_GTE),
        num_rows, len(spans), heads, groups, depth // items, columns,
        min(call.sliding_window or NO_WINDOW, NO_WINDOW), call.scaling, call.softcap or 0.0,
    )  # fmt: skip
    address = kernels.compiled(function).address
    parallel()(ctypes.c_void_p(address), ctypes.c_void_p(record.ctypes.data), ctypes.c_uint(threads), ctypes.c_uint(0))


@cache
def parallel() -> Any:
    """GOMP_parallel(function, argument, threads, flags): OpenMP's own entry, which runs a function in all threads.

    None where PyTorch's OpenMP is neither GNU's nor speaks its language.
    """
    try:
        entry = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    entry.restype = None
    return entry


def _choose(dtype: torch.dtype, depth: int) -> tuple[Any, int]:
    """The kernel for queries of `depth` items, and how many of these it takes for one."""
    if dtype == torch.float32:
        return kernels.attend_float32, 1
    return (kernels.attend_bfloat16, 2) if PAIRS_PAY and depth % 2 == 0 else (kernels.attend_widened, 1)


def scratch_address(num_bytes: int) -> int:
    """Memory for one call, shared by all kernels here: its address, a multiple of 64."""
    global _scratch, _scratch_address
    if _scratch.size < num_bytes + _ALIGN:
        _scratch = np.empty(num_bytes + _ALIGN, np.uint8)
        _scratch_address = -(-_scratch.ctypes.data // _ALIGN) * _ALIGN
    return _scratch_address


def _with_whole_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _strides(x: torch.Tensor) -> tuple[int, int]:
    """Bytes from row to row, and from head to head."""
    return x.stride(1) * x.element_size(), x.stride(0) * x.element_size()

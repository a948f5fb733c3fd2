"""Products by oneDNN, with weights in the order that it wants.

`F.linear` hands oneDNN weights row by row, and oneDNN packs them (puts them into its own order) in every call; in
float32 PyTorch calls MKL instead. Weights that stay in RAM are packed once, where they lie. Measured on 2 cores of a
Zen 5 (AVX-512, bfloat16), GFLOP/s with a `[8192, 2048]` weight, T rows:

    T                      16    64   256  1024
    bfloat16, F.linear    362   742   933   884
    bfloat16, packed      569   870   954   890
    float32, F.linear      76   142   182   173
    float32, oneDNN       165   361   482   396
    float32, packed       233   420   411   451

oneDNN makes a program for every number of rows that a weight is multiplied with, and keeps it. Rows are filled up to
one of few numbers, so that there are few of these, and their memory is in the plan (plan.py, PRODUCTS_BYTES).

The tensors over memory of our own are made through PyTorch's C interface for ahead-of-time compiled models, the
only one that takes a pointer and an opaque layout. Where any of this is missing, layers keep their own forward.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

_ops: Any = torch.ops.mkldnn
ROW_STEPS = ((64, 8), (256, 16), (512, 32))
"""Up to so many rows, products have a multiple of the second number of rows."""
LAST_ROW_STEP = 64


def pack_in_place(weight_NK: torch.Tensor, target: torch.Tensor, in_order: bool = False) -> torch.Tensor | None:
    """The weight in oneDNN's order in the memory of `target`, contiguous, which may be the weight's own; None where it
    needs more room.

    Args:
        in_order: it is there already.
    """
    shape = tuple(weight_NK.shape)
    packed = None if in_order else _ops._reorder_linear_weight(weight_NK.contiguous())
    num_bytes, metadata = _order(shape, target.dtype) if packed is None else _described(packed)
    if num_bytes > target.numel() * target.element_size():
        return None
    if packed is not None:
        ctypes.memmove(target.data_ptr(), _ops.data_ptr(packed), num_bytes)
    return _from_memory(target.data_ptr(), shape, target.dtype, metadata)


@cache
def _order(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, bytes]:
    """The order that oneDNN wants of a weight, which its shape and dtype decide: bytes of the weight, description."""
    return _described(_ops._reorder_linear_weight(torch.zeros(shape, dtype=dtype)))


def _described(packed: torch.Tensor) -> tuple[int, bytes]:
    return _ops._nbytes(packed), bytes(_ops._get_mkldnn_serialized_md(packed).tolist())


def multiply(rows: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """By oneDNN, with rows of zeros behind the others so that their number is one of few. The copy is a small part of
    the product; on average 3 % of the rows are zeros."""
    count, width = rows.numel() // rows.shape[-1], rows.shape[-1]
    filled_up = rows_of_product(count)
    if filled_up == count:
        whole: torch.Tensor = _ops._linear_pointwise.default(rows, weight_NK, bias_N, "none", [], "")
        return whole
    filled = rows.new_empty((filled_up, width))
    filled[:count] = rows.reshape(count, width)
    filled[count:] = 0
    output: torch.Tensor = _ops._linear_pointwise.default(filled, weight_NK, bias_N, "none", [], "")
    return output[:count].view(*rows.shape[:-1], output.shape[-1])


def rows_of_product(count: int) -> int:
    """The number of rows that a product of `count` rows is computed with."""
    step = next((step for most, step in ROW_STEPS if count <= most), LAST_ROW_STEP)
    return -(-count // step) * step


def _from_memory(address: int, shape: tuple[int, ...], dtype: torch.dtype, metadata: bytes) -> torch.Tensor:
    """An opaque oneDNN tensor over memory that somebody else owns and keeps."""
    library = _library()
    int64, sizes = ctypes.c_int64, ctypes.c_int64 * len(shape)
    handle = ctypes.c_void_p()
    code = library.aoti_torch_create_tensor_from_blob_v2(
        ctypes.c_void_p(address),
        int64(len(shape)),
        sizes(*shape),
        sizes(*torch.empty(shape, device="meta").stride()),
        int64(0),
        ctypes.c_int32(getattr(library, f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}")()),
        ctypes.c_int32(library.aoti_torch_device_type_cpu()),
        ctypes.c_int32(0),
        ctypes.byref(handle),
        ctypes.c_int32(library.aoti_torch_layout__mkldnn()),
        (ctypes.c_uint8 * len(metadata))(*metadata),
        int64(len(metadata)),
    )
    if code != 0:
        raise RuntimeError(f"PyTorch {torch.__version__} made no tensor over packed weights: code {code}")
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    steal: Any = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr
    tensor: torch.Tensor = steal(new_capsule(handle.value, None, None))
    return tensor


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))

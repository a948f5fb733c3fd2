"""Matrix products of linear layers on the CPU, by oneDNN, with weights in the order that it wants.

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

import contextlib
import ctypes
import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Set
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from flexgen_lite.workers.compute import product_kernels

_ops: Any = torch.ops.mkldnn
SUPPORTED = {"float32", "bfloat16"}
PADDED_TO = 64  # outputs of a packed weight, at most
ROW_STEPS = ((64, 8), (256, 16), (512, 32))
"""Up to so many rows, products have a multiple of the second number of rows."""
LAST_ROW_STEP = 64


class Products:
    """Makes the linear layers of `model` compute through oneDNN; `pack` packs their weights in place.

    Does nothing where that is not to be had: on a GPU, or on a processor without instructions for `dtype`.

    Args:
        read: modules whose weights are read by others than their own forward: these are not packed.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, device: torch.device, read: Set[nn.Module] = frozenset()
    ) -> None:
        self._model, self._read = model, read
        self._dtype = dtype
        self._available = device.type == "cpu" and _works(dtype)
        self._wanted = _Wanted()
        for module in model.modules():
            if self._available and type(module) is nn.Linear and self._is_ours(module):
                _replace_forward(module, _Product(module, self._wanted))

    @contextlib.contextmanager
    def only(self, rows_N: torch.Tensor, num_rows: int) -> Iterator[None]:
        """Within, products of `num_rows` rows are computed for `rows_N` alone, int64; the other rows come out as zeros.

        For what is behind the last attention: from there on no row depends on another, and few are asked for.
        """
        self._wanted.rows_N, self._wanted.num_rows = rows_N, num_rows
        try:
            yield
        finally:
            self._wanted.rows_N = None

    def pack(self, modules: Iterable[nn.Module], copy_shared: bool = False, in_order: bool = False) -> None:
        """Packs the weights of the linear layers among `modules` in place.

        A weight that would need more room stays as it is; so does one that other modules read too (the head's, where it
        is the embedding's), unless `copy_shared`: then its product uses a packed copy. The parameter of a weight
        that was packed in place becomes a tensor without data, so that nobody can read it by mistake.

        Args:
            in_order: those that can be are packed already, by another process on this machine.
        """
        if not self._available:
            return
        readers = Counter(id(p) for m in self._model.modules() for p in m._parameters.values() if p is not None)
        for module in modules:
            if not self._is_ours(module):
                continue
            if module in self._read:
                continue
            if readers[id(module.weight)] == 1:
                _pack(module, self._wanted, in_order)
            elif copy_shared and type(module) is nn.Linear:
                packed = _ops._reorder_linear_weight(module.weight.data)
                _replace_forward(module, _Product(module, self._wanted, packed))

    def copied_bytes(self, modules: Iterable[nn.Module]) -> int:
        """Memory that `pack` with `copy_shared` takes for the linear layers among `modules`."""
        if not self._available:
            return 0
        readers = Counter(id(p) for m in self._model.modules() for p in m._parameters.values() if p is not None)
        shared = [m.weight for m in modules if type(m) is nn.Linear and self._is_ours(m) and readers[id(m.weight)] > 1]
        return sum(-(-w.shape[0] // PADDED_TO) * PADDED_TO * w.shape[1] * w.element_size() for w in shared)

    def _is_ours(self, module: nn.Module) -> bool:
        return type(module) in (nn.Linear, Conv1D) and getattr(module.weight, "dtype", None) == self._dtype


@dataclasses.dataclass(slots=True)
class _Wanted:
    """Which rows of a product somebody will read; None: all."""

    rows_N: torch.Tensor | None = None
    num_rows: int = 0


def _pack(module: nn.Module, wanted: _Wanted, in_order: bool = False) -> None:
    target: torch.Tensor = module.weight.data  # type: ignore[assignment]
    weight_NK = target if type(module) is nn.Linear else target.t()
    shape = tuple(weight_NK.shape)
    packed = None if in_order else _ops._reorder_linear_weight(weight_NK.contiguous())
    num_bytes, metadata = _order(shape, target.dtype) if packed is None else _described(packed)
    if not target.is_contiguous() or num_bytes > target.numel() * target.element_size():
        return
    if packed is not None:
        ctypes.memmove(target.data_ptr(), _ops.data_ptr(packed), num_bytes)
    view = _from_memory(target.data_ptr(), shape, target.dtype, metadata)
    _replace_forward(module, _Product(module, wanted, view, target))
    module._parameters["weight"] = nn.Parameter(target.to("meta"), requires_grad=False)


@cache
def _order(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, bytes]:
    """The order that oneDNN wants of a weight, which its shape and dtype decide: bytes of the weight, description."""
    return _described(_ops._reorder_linear_weight(torch.zeros(shape, dtype=dtype)))


def _described(packed: torch.Tensor) -> tuple[int, bytes]:
    return _ops._nbytes(packed), bytes(_ops._get_mkldnn_serialized_md(packed).tolist())


class _Product:
    """The forward of one linear layer."""

    def __init__(
        self,
        module: Any,
        wanted: _Wanted,
        packed: torch.Tensor | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        self._module = module
        self._wanted = wanted
        self._packed = packed
        self._memory = memory  # that `packed` points into
        self._few_rows = None if packed is None else _for_few_rows(packed, memory)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        wanted_N, count = self._wanted.rows_N, self._wanted.num_rows
        if wanted_N is None or rows.dim() < 2 or rows.numel() != count * rows.shape[-1] or len(wanted_N) == count:
            return self._multiply(rows)
        product = self._multiply(rows.reshape(count, -1)[wanted_N])
        output = rows.new_zeros((count, product.shape[-1]))
        output[wanted_N] = product
        return output.view(*rows.shape[:-1], -1)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        weight_NK: torch.Tensor = self._module.weight if self._packed is None else self._packed
        if rows.numel() == 0:  # oneDNN takes no empty operands
            return rows.new_empty((*rows.shape[:-1], weight_NK.shape[0]))
        if self._few_rows is not None and self._few_rows.serves(rows, self._module.bias):
            return self._few_rows.multiply(rows, self._module.bias)
        return _multiply_filled_up(rows, weight_NK, self._module.bias)


def _multiply_filled_up(rows: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
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


def _for_few_rows(packed: torch.Tensor, memory: torch.Tensor | None) -> product_kernels.PackedWeight | None:
    """`packed` as our own kernel for few rows sees it; None where it does not serve that weight."""
    if packed.dtype != torch.bfloat16:
        return None
    address = _ops.data_ptr(packed) if memory is None else memory.data_ptr()
    return product_kernels.packed_weight(address, _ops._nbytes(packed), packed.shape)


def _replace_forward(module: Any, forward: _Product) -> None:
    module.forward = forward


def _works(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch on this processor has all that is needed, and computes the same."""
    name = str(dtype).removeprefix("torch.")
    if name not in SUPPORTED or (name == "bfloat16" and not _ops._is_mkldnn_bf16_supported()):
        return False
    try:
        weight = torch.arange(64 * 64, dtype=torch.float32).remainder_(7).view(64, 64).to(dtype)
        layer = nn.Linear(64, 64, bias=False, dtype=dtype)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        _pack(layer, _Wanted())
        rows = torch.ones((product_kernels.MAX_ROWS + 1, 64), dtype=dtype)  # so many for oneDNN, 3 for our own kernel
        alike = all(torch.allclose(layer(x), linear(x, weight)) for x in (rows, rows[:3]))
        return isinstance(layer.forward, _Product) and alike
    except (AttributeError, RuntimeError, OSError):
        return False


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

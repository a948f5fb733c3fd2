"""Matrix products of linear layers on the CPU, with weights in the order that suits the processor.

In bfloat16 they are computed by our own kernels (product_kernels.py): all of them on processors with tile registers,
those of few rows on processors with products of pairs. The others are computed by oneDNN.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from flexgen_lite.model.packing import Packing
from flexgen_lite.workers.compute import experts, product_onednn, product_weights
from flexgen_lite.workers.compute.product_weights import Weights, weights_in_rows
from flexgen_lite.workers.compute.unpacked_weights import PackedBits, bits_of, multiplied
from flexgen_lite.workers.model.quantization import is_experts

_ops: Any = torch.ops.mkldnn
SUPPORTED = {"float32", "bfloat16"}
PADDED_TO = 64  # outputs of a packed weight, at most


class Products:
    """Makes the linear layers and experts of `model` compute here; `pack` puts their weights in order in place.

    Does nothing where that is not to be had: on a GPU, or on a processor without instructions for `dtype`.

    Args:
        read: modules whose weights are read by others than their own forward: these are not packed.
        packings: of weights that are kept in few bits, by their parameters' names.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        device: torch.device,
        read: Set[nn.Module] = frozenset(),
        packings: Mapping[str, Packing] | None = None,
    ) -> None:
        self._model, self._read = model, read
        self._dtype = dtype
        self._available = device.type == "cpu" and _works(dtype)
        self._wanted = _Wanted()
        for module in model.modules():
            if self._available and type(module) is nn.Linear and self._is_ours(module):
                _replace_forward(module, _Product(module, self._wanted))
            if self._available and is_experts(module):
                experts.prepare(module)
        self._bits = bits_of(model, packings or {})
        for module, bits in self._bits.items():
            if is_experts(module):
                module._bits = bits  # type: ignore[assignment]
            else:
                _replace_forward(module, _ProductOfBits(module, self._wanted, bits["weight"], self._available))

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
        """Packs the weights of the linear layers and experts among `modules` in place.

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
            if module in self._bits:
                continue
            if is_experts(module):
                experts.pack(module, in_order)
            if not self._is_ours(module) or module in self._read:
                continue
            if readers[id(module.weight)] == 1:
                _pack(module, self._wanted, in_order)
            elif copy_shared and type(module) is nn.Linear:
                _replace_forward(module, _packed_copy(module, self._wanted))

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
    is_linear = type(module) is nn.Linear
    weight_NK = target if is_linear else target.t()
    if not target.is_contiguous():
        return
    if product_weights.are_fastest() and (ours := weights_in_rows(target.view(weight_NK.shape))) is not None:
        if not product_weights.fills_panels(ours.columns):
            return
        if not is_linear and not in_order:
            target.view(weight_NK.shape).copy_(weight_NK.contiguous())
        product = _Product(module, wanted, ours=ours.in_panels() if in_order else ours.pack(), memory=target)
    else:
        view = product_onednn.pack_in_place(weight_NK, target, in_order)
        if view is None:
            return
        ours = _of_onednn(target.data_ptr(), view)
        product = _Product(module, wanted, view, ours, target)
    _replace_forward(module, product)
    module._parameters["weight"] = nn.Parameter(target.to("meta"), requires_grad=False)


def _packed_copy(module: nn.Linear, wanted: _Wanted) -> _Product:
    weight_NK = module.weight.data
    if not product_weights.are_fastest() or weights_in_rows(weight_NK) is None:
        packed = _ops._reorder_linear_weight(weight_NK)
        return _Product(module, wanted, packed, _of_onednn(_ops.data_ptr(packed), packed))
    columns, width = weight_NK.shape
    copy = weight_NK.new_zeros((-(-columns // PADDED_TO) * PADDED_TO, width))
    copy[:columns] = weight_NK
    ours = weights_in_rows(copy)
    assert ours is not None
    return _Product(module, wanted, ours=dataclasses.replace(ours.pack(), columns=columns), memory=copy)


def _of_onednn(address: int, packed: torch.Tensor) -> Weights | None:
    if packed.dtype != torch.bfloat16:
        return None
    return product_weights.weight_of_onednn(address, _ops._nbytes(packed), packed.shape)


class _Product:
    """The forward of one linear layer.

    Args:
        packed: its weight as oneDNN keeps it.
        ours: its weight as our own kernels see it; without these two, the weight lies row by row in the parameter.
        memory: that `packed` or `ours` point into.
    """

    def __init__(
        self,
        module: Any,
        wanted: _Wanted,
        packed: torch.Tensor | None = None,
        ours: Weights | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        self._module = module
        self._wanted = wanted
        self._packed = packed
        self._ours = ours
        self._memory = memory

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        wanted_N, count = self._wanted.rows_N, self._wanted.num_rows
        if wanted_N is None or rows.dim() < 2 or rows.numel() != count * rows.shape[-1] or len(wanted_N) == count:
            return self._multiply(rows)
        product = self._multiply(rows.reshape(count, -1)[wanted_N])
        output = rows.new_zeros((count, product.shape[-1]))
        output[wanted_N] = product
        return output.view(*rows.shape[:-1], -1)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        bias_N, ours, weight_NK = self._module.bias, self._ours, self._packed
        if ours is None and weight_NK is None:
            weight_NK = self._module.weight
            ours = weights_in_rows(weight_NK)
        if ours is not None and not rows.is_contiguous():
            rows = rows.contiguous()
        if rows.numel() == 0:  # oneDNN takes no empty operands
            return rows.new_empty((*rows.shape[:-1], self._columns()))
        if ours is not None and (weight_NK is None or ours.is_faster(rows.numel() // rows.shape[-1])):
            return ours.multiply(rows, bias_N)
        assert weight_NK is not None
        return product_onednn.multiply(rows, weight_NK, bias_N)

    def _columns(self) -> int:
        return self._module.out_features if type(self._module) is nn.Linear else self._module.nf


class _ProductOfBits(_Product):
    """With a weight of 8 or 4 bits.

    Args:
        by_onednn: unpacked weights are multiplied with by oneDNN, where they must be.
    """

    def __init__(self, module: Any, wanted: _Wanted, bits: PackedBits, by_onednn: bool) -> None:
        super().__init__(module, wanted)
        self._bits, self._by_onednn = bits, by_onednn

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.numel() == 0:
            return rows.new_empty((*rows.shape[:-1], self._columns()))
        bias_N, ours = self._module.bias, self._bits.ours()
        rows = self._bits.in_order(rows)
        if ours is not None:
            return ours.multiply(rows.contiguous(), bias_N)
        multiply = product_onednn.multiply if self._by_onednn else linear
        return multiplied(multiply, rows, self._bits, 0, bias_N)


def on_cpu(module: Any, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The product of a linear layer whose weight lies in main memory, where others are computed on another device."""
    if type(module) is nn.Linear and not isinstance(module.forward, _Product) and _works(dtype):
        return _Product(module, _Wanted())
    forward: Callable[[torch.Tensor], torch.Tensor] = module.forward
    return forward


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
        rows = torch.ones((product_weights.MAX_ROWS + 1, 64), dtype=dtype)  # so many for oneDNN, 3 for our own kernel
        alike = all(torch.allclose(layer(x), linear(x, weight)) for x in (rows, rows[:3]))
        return isinstance(layer.forward, _Product) and alike
    except (AttributeError, RuntimeError, OSError):
        return False

"""What stands between a layer's products, in one pass over memory where Transformers' code takes many.

Transformers' classes stay what is computed: a norm, an activation or a rotary function is replaced where it has given
the same for random rows. In bfloat16 on the CPU; elsewhere everything stays as it is.

Shapes: D items of a row; T tokens; H heads; R items of a head that are turned.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flexgen_lite.workers.compute import fused_kernels as kernels
from flexgen_lite.workers.compute import prefill_cpu
from flexgen_lite.workers.simd import LANES

_ROTARY = "apply_rotary_pos_emb"  # as all of Transformers' models call it
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
_MULTIPLY = {torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__}
_ROUNDED_AWAY = 1e-6  # what is left of 1 - tanh(x) where it has few digits
_EQUAL = 0.98  # of the items, at least; others may be the next bfloat16: sums are in another order here


def fuse(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Replaces what it knows in `model`, whose weights may come later."""
    if dtype != torch.bfloat16 or device.type != "cpu" or prefill_cpu.parallel() is None:
        return
    for module in model.modules():
        if _may_be_norm(module) and (found := _way_of_norm(module)) is not None:
            module.forward = _Norm(module, *found)
        elif (way := _way_of_gate(module)) is not None:
            module.forward = _Gate(module.forward, way)
    for name in {type(module).__module__ for module in model.modules()}:
        code = sys.modules[name]
        function = getattr(code, _ROTARY, None)
        if inspect.isfunction(function) and not isinstance(function, _Rotary) and _is_rotary(function):
            setattr(code, _ROTARY, _Rotary(function))


def _serves(rows: torch.Tensor) -> bool:
    """Whether a kernel can read it: whole vectors of bfloat16 in main memory."""
    return (
        rows.dtype == torch.bfloat16
        and rows.device.type == "cpu"
        and rows.dim() > 0
        and rows.shape[-1] % LANES == 0
        and rows.stride(-1) == 1
        and rows.numel() > 0
    )


def _by_rows(rows: torch.Tensor) -> torch.Tensor:
    """`[rows, D]`, copied where its rows are not at equal distances."""
    return rows.reshape(-1, rows.shape[-1])


class _Norm:
    def __init__(self, module: nn.Module, way: int, eps: float) -> None:
        self._module, self._unfused = module, module.forward
        self._way, self._eps = way, eps

    def __call__(self, rows: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        weight: Any = self._module.weight
        if args or kwargs or not _serves(rows) or not _serves(weight):
            normed: torch.Tensor = self._unfused(rows, *args, **kwargs)
            return normed
        return _norm(rows, weight, self._way, self._eps)


def _norm(rows: torch.Tensor, weight_D: torch.Tensor, way: int, eps: float) -> torch.Tensor:
    source = _by_rows(rows)
    target = torch.empty(rows.shape, dtype=rows.dtype)
    record = kernels.norm_record(
        0, source.data_ptr(), weight_D.data_ptr(), target.data_ptr(), *source.shape, 2 * source.stride(0), way, eps
    )
    kernels.run(kernels.norm, record, rows.numel(), torch.get_num_threads())
    return target


def _may_be_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return len(module._parameters) == 1 and weight is not None and weight.dim() == 1 and not any(module._modules)


def _way_of_norm(module: nn.Module) -> tuple[int, float] | None:
    """How the kernel computes what the module does, and its epsilon; None: it does not."""
    width = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
    epsilons = [x for x in vars(module).values() if isinstance(x, float) and 0 < x < 1]
    if width % LANES or len(epsilons) != 1 or module._buffers or _hooked(module):
        return None
    twin = copy.copy(module)
    draws = torch.Generator().manual_seed(0)
    weight_D = torch.randn(width, generator=draws).bfloat16()
    twin._parameters = {"weight": nn.Parameter(weight_D, requires_grad=False)}
    sizes = epsilons[0] ** 0.5 * torch.tensor([[0.1], [1.0], [10.0], [1e3], [1e6]])  # from where eps is all there is
    rows = (sizes * torch.randn((5, width), generator=draws)).bfloat16()
    try:
        expected = twin(rows)
    except Exception:  # it takes something else, or more
        return None
    for way in (kernels.ROUNDED_FIRST, kernels.ONE_MORE, kernels.IN_FLOAT32):
        if _alike(_norm(rows, weight_D, way, epsilons[0]), expected):
            return way, epsilons[0]
    return None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _alike(found: torch.Tensor, expected: object, within: float = 0.0) -> bool:
    """Whether they are the same, but for a few items that were rounded to a neighbour, or lie `within` of it."""
    if not isinstance(expected, torch.Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    distance = (_places(found) - _places(expected)).abs()
    near = (found.float() - expected.float()).abs() <= within
    return bool(((distance <= 1) | near).all()) and float((distance == 0).float().mean()) >= _EQUAL


def _places(values: torch.Tensor) -> torch.Tensor:
    """Numbers that count bfloat16s in their order."""
    bits = values.contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -32768 - bits, bits)


class _Gate:
    """An activation that waits for what its output is multiplied by."""

    def __init__(self, unfused: Callable[[torch.Tensor], torch.Tensor], way: int) -> None:
        self._unfused, self._way = unfused, way

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if type(rows) is not torch.Tensor or not _serves(rows):
            return self._unfused(rows)
        waiting = rows.as_subclass(_Waiting)
        waiting.of, waiting.version = self, _version(rows)
        return waiting

    def times(self, rows: torch.Tensor, factor: object) -> torch.Tensor | None:
        """The activation of `rows`, times `factor`; None: the kernel cannot read that."""
        if type(factor) is not torch.Tensor or factor.shape != rows.shape or not _serves(factor):
            return None
        return _gated(rows, factor, self._way)

    def activated(self, rows: torch.Tensor) -> torch.Tensor:
        return self._unfused(rows)


class _Waiting(torch.Tensor):
    """Input of an activation in its output's place: whatever is asked of it but a product is asked of the output."""

    of: _Gate
    version: int
    _output: torch.Tensor | None = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _MULTIPLY and not kwargs and len(args) == 2:
                waiting, factor = args if type(args[0]) is cls else args[::-1]
                if waiting._output is None and (product := waiting.of.times(_plain(waiting), factor)) is not None:
                    return product
            return func(*_outputs(args), **_outputs(kwargs or {}))


def _plain(waiting: _Waiting) -> torch.Tensor:
    if waiting.version != _version(waiting):
        raise RuntimeError("the input of an activation was changed before its output was used, which is not supported")
    return waiting.as_subclass(torch.Tensor)


def _version(rows: torch.Tensor) -> int:
    """How often it was changed; 0 where PyTorch does not count."""
    return 0 if rows.is_inference() else rows._version


def _outputs(value: Any) -> Any:
    """`value` with the outputs of activations that wait in it."""
    if type(value) is _Waiting:
        if value._output is None:
            value._output = value.of.activated(_plain(value))
        return value._output
    if isinstance(value, dict):
        return {name: _outputs(part) for name, part in value.items()}
    return type(value)(map(_outputs, value)) if type(value) in (tuple, list) else value


def _gated(gate: torch.Tensor, up: torch.Tensor, way: int) -> torch.Tensor:
    gate_rows, up_rows = _by_rows(gate), _by_rows(up)
    target = torch.empty(gate.shape, dtype=gate.dtype)
    record = kernels.gate_record(
        0, gate_rows.data_ptr(), up_rows.data_ptr(), target.data_ptr(), *gate_rows.shape,
        2 * gate_rows.stride(0), 2 * up_rows.stride(0), way,
    )  # fmt: skip
    kernels.run(kernels.gate, record, gate.numel(), torch.get_num_threads())
    return target


def _way_of_gate(module: nn.Module) -> int | None:
    """Of an activation that is a function alone; None: of another class, another function, or one that changes what it
    is given."""
    if not type(module).__module__.startswith(_ACTIVATIONS) or _hooked(module) or module._parameters:
        return None
    rows = torch.linspace(-12, 12, 64 * LANES).bfloat16()
    given = rows.clone()
    try:
        expected = module(given)
    except Exception:  # it takes something else, or more
        return None
    if not torch.equal(given, rows):
        return None
    ones = torch.ones_like(rows)
    ways = (kernels.SILU, kernels.GELU_TANH)
    return next((way for way in ways if _alike(_gated(rows, ones, way), expected, _ROUNDED_AWAY)), None)


class _Rotary:
    """Turns queries and keys by their positions."""

    def __init__(self, unfused: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._unfused = unfused

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if len(args) == 4 and not kwargs and self._can_read(*args):
            query, key, cos, sin = args
            return _turned(query, cos, sin), _turned(key, cos, sin)
        return self._unfused(*args, **kwargs)

    @staticmethod
    def _can_read(query: Any, key: Any, cos: Any, sin: Any) -> bool:
        same = cos.shape == sin.shape and cos.stride() == sin.stride() and cos.dim() == 3 and cos.shape[0] == 1
        width = cos.shape[-1]
        return (
            same
            and width % (2 * LANES) == 0
            and all(map(_serves, (query, key, cos, sin)))
            and all(x.dim() == 4 and x.shape[0] == 1 and x.shape[-1] == width for x in (query, key))
            and query.shape[2] == key.shape[2] == cos.shape[1]
        )


def _turned(x_1HTD: torch.Tensor, cos_1TR: torch.Tensor, sin_1TR: torch.Tensor) -> torch.Tensor:
    _, heads, tokens, width = x_1HTD.shape
    by_token = x_1HTD.stride(1) < x_1HTD.stride(2)
    target = torch.empty((1, tokens, heads, width) if by_token else x_1HTD.shape, dtype=x_1HTD.dtype)
    target = target.transpose(1, 2) if by_token else target
    record = kernels.rotary_record(
        0, x_1HTD.data_ptr(), cos_1TR.data_ptr(), sin_1TR.data_ptr(), target.data_ptr(), tokens, heads, width,
        cos_1TR.shape[-1], 2 * x_1HTD.stride(2), 2 * x_1HTD.stride(1), 2 * cos_1TR.stride(1),
        2 * target.stride(2), 2 * target.stride(1),
    )  # fmt: skip
    kernels.run(kernels.rotary, record, x_1HTD.numel(), torch.get_num_threads())
    return target


def _is_rotary(function: Callable[..., Any]) -> bool:
    """Whether it turns the two halves of a head by each other, as the kernel does."""
    draws = torch.Generator().manual_seed(0)
    width = 4 * LANES
    query, key, cos, sin = (
        torch.randn(shape, generator=draws).bfloat16()
        for shape in ((1, 3, 5, width), (1, 2, 5, width), (1, 5, width), (1, 5, width))
    )
    try:
        found = function(query, key, cos, sin)
    except Exception:  # it takes others
        return False
    expected = (_turned(query, cos, sin), _turned(key, cos, sin))
    return isinstance(found, tuple) and len(found) == 2 and all(map(_alike, expected, found))

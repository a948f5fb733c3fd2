"""Products on the CPU beside a device: of the linear layers that lead to attention (Q, K and V, or what latents are
made of), with weights that stay in main memory.

The rows that come to such a layer are copied to the host, multiplied there, and the results copied back; whatever the
model's class does with them, norms and rotary positions, it does on the device. With many rows of prompts the processor
would take long: in such a pass each layer's projections are copied into its slot on the device, behind its other
weights, when the first micro-batch enters it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence, Set

import torch
from torch import nn

from flexgen_lite.memory.projection_units import MOST_PROMPT_ROWS
from flexgen_lite.model.spec import UnitSpec
from flexgen_lite.wire.worker_messages import TokenBatch
from flexgen_lite.workers.compute.device import Device
from flexgen_lite.workers.compute.products import on_cpu
from flexgen_lite.workers.compute.trial import TextPath
from flexgen_lite.workers.model.weight_map import Binding

Product = Callable[[torch.Tensor], torch.Tensor]


def projections_of(
    model: nn.Module, path: TextPath, units: Sequence[UnitSpec], read: Set[nn.Module]
) -> list[tuple[tuple[nn.Module, ...], tuple[int, ...]]]:
    """By layer, the linear layers that lead to its attention calls, and the tensors of its unit that they have.

    Args:
        units: of the layers, at least.
        read: modules whose weights are read by others than their own forward.
    """
    names = {module: name for name, module in model.named_modules()}
    readers = Counter(id(p) for module in names for p in module._parameters.values() if p is not None)
    found = []
    for layer in range(len(path.layers)):
        numbers = {tensor.name: number for number, tensor in enumerate(units[layer].tensors)}
        columns = (leading for leading, of in zip(path.projections, path.columns, strict=True) if of == layer)
        modules, tensors = [], set[int]()
        for module in dict.fromkeys(module for leading in columns for module in leading):
            own = {f"{names[module]}.{name}": p for name, p in module._parameters.items() if p is not None}
            if module not in read and own.keys() <= numbers.keys() and all(readers[id(p)] == 1 for p in own.values()):
                modules.append(module)
                tensors |= {numbers[name] for name in own}
        found.append((tuple(modules), tuple(sorted(tensors))))
    return found


class HostProjections:
    """
    Args:
        units: of all layers, of what is outside them, and of the projections of `layers`, in this order.
        layers: whose projections are computed on the CPU.
        slots: memory that holds their weights, for good.
        modules: the linear layers, by layer.
    """

    def __init__(
        self,
        device: Device,
        binding: Binding,
        units: Sequence[UnitSpec],
        layers: Sequence[int],
        slots: Sequence[torch.Tensor],
        modules: Sequence[Iterable[nn.Module]],
        dtype: torch.dtype,
    ) -> None:
        self._device, self._binding, self._units = device, binding, units
        self._unit_of = {layer: len(units) - len(layers) + index for index, layer in enumerate(layers)}
        self._slot_of = dict(zip(layers, slots, strict=True))
        self._on_device: set[int] = set()  # layers whose projections lie there in this pass
        self._travels = False  # they do in this pass
        self._copied: tuple[weakref.ref[torch.Tensor], int, torch.Tensor] | None = None  # rows that came last
        for layer in layers:
            self._binding.bind(self._unit_of[layer], self._slot_of[layer])
            for module in modules[layer]:
                module.forward = _HostProduct(self, on_cpu(module, dtype), module.forward)

    def begin(self, batches: Iterable[TokenBatch]) -> None:
        """A pass."""
        spans = [span for batch in batches for span in batch.spans]
        self._travels = sum(span.num_rows for span in spans if span.prefill or span.num_rows > 1) > MOST_PROMPT_ROWS
        for layer in self._on_device:
            self._binding.bind(self._unit_of[layer], self._slot_of[layer])
        self._on_device.clear()

    def enter(self, layer: int, slot: torch.Tensor) -> int:
        """Before a micro-batch enters `layer`, whose other weights lie in `slot` on the device. The bytes that were
        copied there."""
        unit = self._unit_of.get(layer)
        if unit is None or not self._travels or layer in self._on_device:
            return 0
        num_bytes = self._units[unit].num_bytes
        start = self._units[layer].num_bytes
        room = slot[start : start + num_bytes]
        self._device.copy_weights(room, self._slot_of[layer][:num_bytes])
        self._binding.bind(unit, room)
        self._on_device.add(layer)
        return num_bytes

    def forget_rows(self) -> None:
        """Lets go of the rows that were copied last."""
        self._copied = None

    @property
    def travel(self) -> bool:
        """The projections lie on the device in this pass."""
        return self._travels

    def rows_on_host(self, rows: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor that is on the device; linear layers that follow each other are often given the same."""
        if self._copied is not None:
            known, version, copy = self._copied
            if known() is rows and version == rows._version:
                return copy
        copy = self._device.fetch(rows)
        self._copied = weakref.ref(rows), rows._version, copy
        return copy

    def on_device(self, product: torch.Tensor) -> torch.Tensor:
        buffer = self._device.host_buffer(product.numel(), product.dtype).view(product.shape)
        buffer.copy_(product)
        return self._device.from_host(buffer)


class _HostProduct:
    """The forward of one of these linear layers."""

    def __init__(self, owner: HostProjections, on_host: Product, on_device: Product) -> None:
        self._owner, self._on_host, self._on_device = owner, on_host, on_device

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if self._owner.travel:
            return self._on_device(rows)
        return self._owner.on_device(self._on_host(self._owner.rows_on_host(rows)))

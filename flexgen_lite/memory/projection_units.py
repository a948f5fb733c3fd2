"""Layers whose projections are computed on the CPU have two units: what goes to the device, and the projections, which
stay in main memory.

    units of a model    layer 0 .. L - 1, outside the layers
    behind them         projections of the first of these layers, of the second ...

The projections that lead to a layer's attention calls are Q, K and V, one by one or fused, or what latents are made of.
On the device a layer's slot has the one behind the other: there is room for the projections, which most passes leave
as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flexgen_lite.memory.slot_layout import BLOCK_BYTES, TensorSource, layout_unit
from flexgen_lite.model.spec import ModelSpec, TensorSpec, UnitSpec

MOST_PROMPT_ROWS = 64
"""Of a pass whose projections are computed on the CPU. A product of R rows with weights of 16 bits takes as long as
copying them where R = FLOP/s over bytes/s: 16 to 64 for 0.4 to 1.6 TFLOP/s beside PCIe at 25 GB/s."""


def layers_with_projections(spec: ModelSpec) -> tuple[int, ...]:
    return tuple(layer for layer, tensors in enumerate(spec.projections) if tensors)


def units_of(spec: ModelSpec, layers: Sequence[int]) -> tuple[UnitSpec, ...]:
    """The model's units, those of `layers` without their projections, and behind them a unit of projections for each of
    `layers`, which must have some."""
    units, projections = list(spec.units), []
    for layer in layers:
        whole, apart = spec.units[layer], set(spec.projections[layer])
        assert apart, f"layer {layer} has no projections"
        units[layer] = _unit(whole.name, (t for n, t in enumerate(whole.tensors) if n not in apart))
        projections.append(_unit(f"{whole.name}, projections", (t for n, t in enumerate(whole.tensors) if n in apart)))
    return *units, *projections


def shares_apart(spec: ModelSpec, layers: Sequence[int]) -> dict[int, float]:
    """By layer, the share of its bytes that are projections."""
    units = units_of(spec, layers)
    found = {}
    for unit, layer in enumerate(layers, start=spec.num_layers + 1):
        rest, apart = units[layer].num_bytes, units[unit].num_bytes
        found[layer] = apart / (rest + apart)
    return found


def _unit(name: str, tensors: Iterable[TensorSpec]) -> UnitSpec:
    """Without gaps that would be copied to the device for nothing."""
    sources = [TensorSource(t.name, t.dtype, t.shape, t.pieces, t.packing) for t in tensors]
    return layout_unit(name, sources, max_gap=BLOCK_BYTES)

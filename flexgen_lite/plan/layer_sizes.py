"""Bytes that slots for layers take, and where projections are computed on the CPU those for projections. Pure logic."""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_lite.memory.projection_units import layers_with_projections, units_of
from flexgen_lite.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """
    Attributes:
        whole: of the largest layer, with its projections.
        without: of the largest of what goes to the device where projections stay in main memory; else as `whole`.
        projections: of the most that may stay so of a layer; 0: none do.
        split: layers whose projections may.
    """

    whole: int
    without: int
    projections: int = 0
    split: tuple[int, ...] = ()

    @property
    def apart(self) -> int:
        """Of the projections of all layers."""
        return len(self.split) * self.projections


def layer_sizes(spec: ModelSpec, on_cpu: bool) -> LayerSizes:
    """`on_cpu`: projections of layers that do not stay on the device are computed on the CPU."""
    largest = max(unit.num_bytes for unit in spec.units[:-1])
    layers = layers_with_projections(spec) if on_cpu else ()
    if not layers:
        return LayerSizes(largest, largest)
    units = units_of(spec, layers)
    rests, apart = units[: spec.num_layers], units[spec.num_layers + 1 :]
    together = [rests[layer].num_bytes + unit.num_bytes for layer, unit in zip(layers, apart, strict=True)]
    whole, without = max(largest, *together), max(unit.num_bytes for unit in rests)
    projections = max(whole - without, *(unit.num_bytes for unit in apart))
    return LayerSizes(whole, without, projections, layers)

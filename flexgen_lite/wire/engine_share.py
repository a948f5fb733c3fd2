"""What one of several engines of a machine is told of its part, by whoever starts all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """How weights lie that all engines of a machine map: the first engine decides it, the others are told.

    Attributes:
        resident_layers: layers in main memory for good.
        num_bytes: of the arena that holds them, and what is outside the layers.
        layout: the same as long as the same bytes lie at the same places; "": nobody knows.
    """

    resident_layers: tuple[int, ...]
    num_bytes: int
    layout: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{**values, "resident_layers": tuple(values["resident_layers"])})


@dataclass(frozen=True, slots=True)
class EngineShare:
    """
    Attributes:
        number: of the engine, from 0.
        count: engines of the machine.
        cpus: that this one may use; none: all.
        ram: bytes that all engines together may take of main memory.
        arena_fd: descriptor of the arena of shared weights, which the coordinator inherits.
        weights: what lies in that arena; None: this engine decides it, and fills the arena.
    """

    number: int
    count: int
    cpus: tuple[int, ...]
    ram: int
    arena_fd: int
    weights: SharedWeights | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        weights = values["weights"]
        shared = None if weights is None else SharedWeights.from_dict(weights)
        return cls(**{**values, "cpus": tuple(values["cpus"]), "weights": shared})

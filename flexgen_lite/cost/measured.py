"""What calibration has seen: passes of known shape, and the time that their parts took. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PassShape:
    """
    Attributes:
        order: of the weights, "packed" or "raw".
        singles: by micro-batch, sequences of which one token is computed.
        context: tokens that each of these has stored.
        prompts: by micro-batch, rows of each prompt; empty: there are none.
    """

    order: str
    singles: tuple[int, ...]
    context: int
    prompts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Seconds; of the segments of the first columns, or of all.

    Attributes:
        segments: by column and micro-batch.
        attention: of the worker that took longest, by column and micro-batch; 0 where there is none.
        hop: that an attention's way there and back takes, where there is one micro-batch.
        behind: by column, the share of its segment that is behind the attention of the column before; empty: these
            parts did not run by themselves.
        begin: from the order to the first segment.
        overlap: in which segments and attention ran at once, where there are several micro-batches.
        length: from the order to the last end.
    """

    shape: PassShape
    segments: tuple[tuple[float, ...], ...]
    attention: tuple[tuple[float, ...], ...]
    hop: float
    begin: float
    behind: tuple[float, ...] = ()
    overlap: float = 0.0
    length: float = 0.0

    @property
    def busy(self) -> float:
        """Share of its length in which segments or attention run, of one micro-batch."""
        seconds = sum(map(sum, self.segments)) + sum(map(sum, self.attention))
        return min(1.0, seconds / self.length) if self.length else 1.0


@dataclass(frozen=True, slots=True)
class BesideLoads:
    """
    Attributes:
        passes: with nothing beside them, and while the loader reads.
        loads_alone: seconds of a unit, with nothing beside it.
        loads: beside each of these passes.
    """

    passes: tuple[tuple[PassTimes, PassTimes], ...]
    loads_alone: tuple[float, ...]
    loads: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Times:
    """
    Attributes:
        passes: with nothing beside them.
        loads: seconds by the kind of layer, into memory that was touched before.
        uploads: seconds by the kind of layer.
        overlapping: passes of one micro-batch, and of several such ones.
        projections: share of a layer's bytes that are projections which the CPU computes beside a device, by the kind
            of layer; loads and uploads are of the rest.
        pieces, both: passes with many short prompts, and with single rows and a prompt; empty where no state goes
            through them.
        disk: bytes per second of plain reads, before and after `loads`; 0: these come from no file.
    """

    passes: tuple[PassTimes, ...]
    beside: BesideLoads
    loads: Mapping[int, tuple[float, ...]]
    uploads: Mapping[int, float]
    overlapping: tuple[tuple[PassTimes, PassTimes], ...] = ()
    projections: Mapping[int, float] = field(default_factory=dict)
    pieces: tuple[PassTimes, ...] = ()
    both: tuple[PassTimes, ...] = ()
    disk: float = 0.0

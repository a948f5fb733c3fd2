"""How fast a machine does the parts of a pass of one model: what calibration measures. Pure logic.

All times are seconds of one lane alone; what lanes take from each other is said beside them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

SLOWER = 1.3  # times as long as plain reads, for a load not to be the disk's
PACKED, RAW = "packed", "raw"  # weights in the order that products want, and as they are loaded
ON_HOST = "host"  # as they are loaded, and projections are computed on the CPU beside a device


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds over a number of rows, straight between the points that were measured and on behind the last one."""

    points: tuple[tuple[float, float], ...]

    def at(self, rows: float) -> float:
        if rows <= 0:
            return 0.0
        numbers = [point[0] for point in self.points]
        index = bisect_left(numbers, rows)
        if index == 0:
            return self.points[0][1]
        index = min(index, len(self.points) - 1)
        if index == 0:
            return self.points[0][1] * rows / self.points[0][0]
        (x0, y0), (x1, y1) = self.points[index - 1], self.points[index]
        return y0 + (y1 - y0) * (rows - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True)
class SegmentRates:
    """Of segments of one kind.

    Attributes:
        prompt: rows of prompts, without what grows with the square of their lengths.
        decode: single rows of as many sequences.
        behind: share of it that is behind the attention of the column before.
        piece: seconds of each part of a prompt more than so many rows come in, where a state goes through them.
        both: seconds more where a segment has single rows and prompts.
    """

    prompt: Curve
    decode: Curve
    behind: float = 0.8
    piece: float = 0.0
    both: float = 0.0

    def seconds(self, singles: int, others: int, pieces: int = 0) -> float:
        """Of a segment with both: all rows go through the same products, single ones cost what they cost beyond."""
        rows = singles + others
        if not others:
            return self.decode.at(singles)
        beyond = self.decode.at(singles) - self.prompt.at(singles) if singles else 0.0
        more = self.piece * pieces + (self.both if singles else 0.0)
        return max(self.prompt.at(rows) + beyond, self.prompt.at(others)) + more


@dataclass(frozen=True, slots=True)
class AttentionRates:
    """Of an attention worker, for a column of one kind.

    Attributes:
        call: of a micro-batch, with the way there and back.
        sequence: of a sequence that attends.
        token: of a token whose K and V are read.
        row: of a row whose K and V are stored.
    """

    call: float
    sequence: float
    token: float
    row: float

    def seconds(self, sequences: int, tokens: float, rows: int) -> float:
        return self.call + self.sequence * sequences + self.token * tokens + self.row * rows


@dataclass(frozen=True, slots=True)
class Rates:
    """
    Attributes:
        segments: by "packed", "raw" or "host" and the kinds of the columns, "packed 0>1".
        pair: of a row of a prompt and a token that it sees, by the kind of the column.
        head: of the last segment, by rows that are sampled from; without what its column costs.
        attention: by the kind of the column.
        load, upload: of a unit, by the kind of its layer; -1 for what is outside the layers.
        begin: of a pass before its first segment, by rows.
        turn: of the coordinator between two passes, and of each sequence.
        attends_beside_disk, reads_beside_compute: share of its speed that attention keeps while the loader works, and
            the loader beside products and attention.
        computes_beside_disk: the same of products while the loader works, by their rows.
        disk: bytes per second of plain reads when loads were measured; 0: they come from no file.
        computes_beside_attention, attends_beside_compute: share of its speed that each keeps while the other works.
    """

    segments: Mapping[str, SegmentRates]
    pair: Mapping[int, float]
    head: Curve
    attention: Mapping[int, AttentionRates]
    load: Mapping[int, float]
    upload: Mapping[int, float]
    begin: Curve
    turn: tuple[float, float]
    attends_beside_disk: float = 1.0
    reads_beside_compute: float = 1.0
    computes_beside_disk: tuple[tuple[float, float], ...] = ()
    disk: float = 0.0
    computes_beside_attention: float = 1.0
    attends_beside_compute: float = 1.0

    def with_disk(self, rate: float, unit_bytes: Mapping[int, int], converted: Collection[int]) -> Rates:
        """The same where a disk gives so many bytes per second: loads take as much more as plain reads do. Those that
        are slower than the disk, as they go through the processor's hands, take no less than they took.

        Args:
            unit_bytes: that are read of a unit, by the kind of its layer.
            converted: kinds whose weights are cast or rearranged on their way.
        """
        if not self.disk or not rate:
            return self
        load = {}
        for kind, read in unit_bytes.items():
            plain, taken = read / self.disk, self.load.get(kind, read / self.disk)
            if kind in converted and taken > SLOWER * plain:
                load[kind] = max(taken, read / rate)
            else:
                load[kind] = taken * self.disk / rate
        return replace(self, load=load, disk=rate)

    def computes_at(self, rows: float) -> float:
        """Share of its speed that a segment of so many rows keeps while the loader works."""
        if not self.computes_beside_disk:
            return 1.0
        (first, share), (last, end) = self.computes_beside_disk[0], self.computes_beside_disk[-1]
        if rows <= first or len(self.computes_beside_disk) == 1:
            return share
        return Curve(self.computes_beside_disk).at(rows) if rows < last else end

    def segment(self, packed: bool, kinds: tuple[int, int], on_host: bool = False) -> SegmentRates:
        """Of the kind, or of the one that is nearest to it of those that were measured. `on_host`: with projections
        computed on the CPU beside a device."""
        order = [PACKED, RAW] if packed else [RAW, PACKED]
        order = [ON_HOST, *order] if on_host else order
        for name in order:
            if (found := self.segments.get(f"{name} {kinds[0]}>{kinds[1]}")) is not None:
                return found
        for name in order:
            for key, value in self.segments.items():
                if key.startswith(name) and key.endswith(f">{kinds[1]}"):
                    return value
        return next(iter(self.segments.values()))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError where they are no rates."""

        def curve(value: Mapping[str, Any]) -> Curve:
            return Curve(tuple((float(x), float(y)) for x, y in value["points"]))

        def by_kind(name: str) -> dict[int, float]:
            return {int(kind): float(value) for kind, value in values[name].items()}

        return cls(
            segments={
                key: SegmentRates(
                    curve(value["prompt"]),
                    curve(value["decode"]),
                    *(float(value[name]) for name in ("behind", "piece", "both")),
                )
                for key, value in values["segments"].items()
            },
            pair=by_kind("pair"),
            head=curve(values["head"]),
            attention={int(kind): AttentionRates(**value) for kind, value in values["attention"].items()},
            load=by_kind("load"),
            upload=by_kind("upload"),
            begin=curve(values["begin"]),
            turn=(float(values["turn"][0]), float(values["turn"][1])),
            attends_beside_disk=float(values["attends_beside_disk"]),
            reads_beside_compute=float(values["reads_beside_compute"]),
            computes_beside_disk=tuple((float(x), float(y)) for x, y in values["computes_beside_disk"]),
            disk=float(values["disk"]),
            computes_beside_attention=float(values["computes_beside_attention"]),
            attends_beside_compute=float(values["attends_beside_compute"]),
        )

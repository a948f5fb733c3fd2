"""Seconds of each part of a pass, by rates. Pure logic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexgen_lite.cost.fit import pairs, pieces_of
from flexgen_lite.cost.kinds import OUTSIDE, column_kinds, layer_kinds, segment_kinds
from flexgen_lite.cost.rates import Rates
from flexgen_lite.memory.projection_units import MOST_PROMPT_ROWS, shares_apart
from flexgen_lite.model.spec import ModelSpec, first_seen
from flexgen_lite.plan.plan import Plan
from flexgen_lite.queue.micro_batch import MicroBatch, Piece

CHECKSUMS = 4e9  # bytes per second of KV that goes to disk or comes from it, beside what the disk takes
UNKNOWN_DISK = 1e9  # where weights come from no file


@dataclass(frozen=True, slots=True)
class MicroBatchWork:
    """Of one micro-batch.

    Attributes:
        workers: that its sequences are held by.
        segments: seconds by column, and of the last segment.
        behind: by column, the share of its segment that is behind the attention of the column before.
        attention: seconds by column and worker, of those that there are.
        beside_disk: share of its speed that a segment keeps while the loader works.
    """

    workers: tuple[int, ...]
    segments: tuple[float, ...]
    behind: tuple[float, ...]
    attention: tuple[dict[int, float], ...]
    beside_disk: float


class Work:
    """What a model's passes take under a plan.

    Args:
        slot_bytes: of a page on disk; 0: none goes there.
    """

    def __init__(self, spec: ModelSpec, plan: Plan, rates: Rates, slot_bytes: int = 0) -> None:
        self._spec, self._rates, self._slot_bytes = spec, rates, slot_bytes
        self._columns, self._segments = column_kinds(spec), segment_kinds(spec)
        layers = layer_kinds(spec)
        ring = set(plan.ring_layers(spec.num_layers))
        packed = [not plan.staged and layer not in ring for layer in spec.columns]
        # A segment is mostly what is behind the attention of the column before.
        self._packed = [packed[0], *packed]
        self._loads = {layer: rates.load.get(kind, 0.0) for layer, kind in enumerate(layers)}
        self._loads[spec.num_layers] = rates.load.get(OUTSIDE, 0.0)
        self._uploads = {layer: rates.upload.get(kind, 0.0) for layer, kind in enumerate(layers)}
        self._copies = dict[int, float]()  # of projections, by the column that enters their layer
        self._take_apart(spec, plan.projection_layers)
        beside = bool(plan.projection_layers)
        self._beside = [beside and layer not in plan.device_layers for layer in spec.columns]
        self._stops = frozenset(spec.stops)
        self._behind = tuple(
            rates.segment(packed, kind, beside).behind
            for kind, packed, beside in zip(self._segments[:-1], self._packed, self._beside, strict=False)
        )

    def _take_apart(self, spec: ModelSpec, layers: Sequence[int]) -> None:
        """Projections that stay in main memory are loaded by themselves, and copied in some passes."""
        for unit, (layer, share) in enumerate(shares_apart(spec, layers).items(), start=spec.num_layers + 1):
            self._loads[unit] = self._loads[layer] * share
            self._loads[layer] -= self._loads[unit]
            self._copies[spec.columns.index(layer)] = self._uploads[layer] * share
            self._uploads[layer] *= 1 - share

    def load(self, unit: int) -> float:
        return self._loads[unit]

    def upload(self, unit: int) -> float:
        return self._uploads.get(unit, 0.0)

    def move(self, num_slots: int) -> float:
        """Of KV to disk or from it. It is written as fast as weights are read; then checksums are taken."""
        return num_slots * self._slot_bytes * (1 / (self._rates.disk or UNKNOWN_DISK) + 1 / CHECKSUMS)

    def begin(self, micro_batches: Sequence[MicroBatch]) -> float:
        """From the end of a pass to the first segment of this one."""
        sequences = sum(len(batch.pieces) for batch in micro_batches)
        turn, each = self._rates.turn
        return turn + each * sequences + self._rates.begin.at(sum(batch.num_rows for batch in micro_batches))

    def of_pass(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatchWork]:
        pieces = [piece for batch in micro_batches for piece in batch.pieces]
        prompts = sum(piece.num_rows for piece in pieces if piece.prefill or piece.num_rows > 1)
        copied = bool(self._copies) and prompts > MOST_PROMPT_ROWS
        found = [self._of(batch, copied) for batch in micro_batches]
        if copied and found:
            first = found[0]  # that comes to a layer
            seconds = (taken + self._copies.get(column, 0.0) for column, taken in enumerate(first.segments))
            found[0] = replace(first, segments=tuple(seconds))
        return found

    def _of(self, batch: MicroBatch, copied: bool) -> MicroBatchWork:
        """`copied`: projections that the CPU would compute are on the device in this pass."""
        prompts = [piece for piece in batch.pieces if piece.prefill]
        singles = sum(1 for piece in batch.pieces if piece.num_rows == 1 and not piece.prefill)
        others = batch.num_rows - singles
        asked = sum(1 for piece in batch.pieces if piece.completes)
        asked += sum(len(scored.targets) for piece in batch.pieces if (scored := piece.scored) is not None)
        pieces = pieces_of([piece.num_rows for piece in batch.pieces if piece.num_rows > 1 or piece.prefill])
        seconds, of_kinds = [], dict[tuple[int, int, bool, bool], float]()
        pairs_of_kinds = {kind: self._pairs(kind, prompts) for kind in set(self._columns)}
        for (before, after), packed, beside in zip(self._segments[:-1], self._packed, self._beside, strict=False):
            on_host = beside and not copied
            key = before, after, packed, on_host
            if key not in of_kinds:
                rate = self._rates.segment(packed, (before, after), on_host).seconds(singles, others, pieces)
                of_kinds[key] = rate + (pairs_of_kinds[before] if before != OUTSIDE else 0.0)
            seconds.append(of_kinds[key])
        seconds.append(self._rates.head.at(asked) + pairs_of_kinds[self._columns[-1]])
        by_worker: dict[int, list[Piece]] = {}
        for piece in batch.pieces:
            by_worker.setdefault(piece.request.worker, []).append(piece)
        attention_of_kinds: dict[int, dict[int, float]] = {}
        attention = []
        for column, kind in enumerate(self._columns):
            if kind not in attention_of_kinds:
                stop = column in self._stops
                attention_of_kinds[kind] = {
                    worker: 0.0 if stop else self._attention(kind, pieces) for worker, pieces in by_worker.items()
                }
            attention.append(attention_of_kinds[kind])
        return MicroBatchWork(
            batch.workers(),
            tuple(seconds),
            (*self._behind, 0.0),
            tuple(attention),
            self._rates.computes_at(batch.num_rows),
        )

    def _pairs(self, kind: int, prompts: Sequence[Piece]) -> float:
        rate = self._rates.pair.get(kind, 0.0)
        spec = self._spec.attention[self._columns.index(kind)]
        return rate * sum(pairs(spec, 0, piece.num_rows) for piece in prompts) if rate else 0.0

    def _attention(self, kind: int, pieces: Sequence[Piece]) -> float:
        spec = self._spec.attention[self._columns.index(kind)]
        sequences, tokens, rows = 0, 0.0, 0
        for piece in pieces:
            if piece.prefill:
                rows += piece.num_rows
                continue
            sequences += 1
            last = piece.request.stored + piece.num_rows - 1
            seen = last + 1 - first_seen(last, spec.sliding_window or 0, spec.attention_chunk or 0)
            tokens += seen * max(1.0, piece.num_rows / 4)  # queries of some rows go through a token at once
            rows += piece.num_rows if piece.num_rows > 1 else 0
        return self._rates.attention[kind].seconds(sequences, tokens, rows)

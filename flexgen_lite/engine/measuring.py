"""What calibration measures, one after the other."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_lite.cost.fit import PIECE_ROWS
from flexgen_lite.cost.kinds import columns_to_measure, layer_kinds
from flexgen_lite.cost.measured import BesideLoads, PassShape, PassTimes, Times
from flexgen_lite.engine.setup import Setup
from flexgen_lite.memory.projection_units import shares_apart
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.plan.disk_rate import read_rate
from flexgen_lite.queue.micro_batch import MicroBatch, Piece
from flexgen_lite.queue.page_table import PageTable
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.wire.sampling import WireParams

if TYPE_CHECKING:
    from flexgen_lite.engine.calibrator import Calibrator, PassSpans

MOST_COLUMNS = 16
FEW_COLUMNS = 4  # of passes with many rows, whose weights are in no cache anyway
MANY_ROWS = 256
SINGLES = (1, 4, 16, 8, 32, 64, 128, 256)  # the first ones first, where there is time
PROMPT_ROWS = (16, 64, 128, 256, 512, 1024, 2048)
NEEDED = (1, 16, 64, 256)  # rows that are measured however long it takes; others as far as there is time
WHOLE = (1, 16, 64, 256)  # single rows that go through all layers, for what comes behind them
OVERLAPPING = 32  # sequences of a micro-batch
SHORT_PROMPT = PIECE_ROWS
PIECES, BOTH = ((0, (16,) * 4),), ((4, (60,)), (16, (48,)))  # single rows, and rows of prompts
SHORT_CONTEXT, LONG_CONTEXT = 32, 1024
SECONDS = 30.0  # for all passes but those that are needed
LONGEST_PASS = 8.0
DISK_SECONDS = 0.5
LOADED_AGAIN = 8  # units at most, of each kind
LOADS = 3  # into a slot: at the first memory is taken, at the second large pages are
KV_BYTES = 1 << 30  # of what is attended to: memory is taken when it is first read
LONG_SEQUENCES = 64  # with long contexts, at most
STATES_BYTES = 1 << 30  # of sequences whose rows are measured: memory is taken when they are first written
LEAST_STATES = 16
LOADS_BESIDE = 8  # at least, beside passes of a shape
MOST_PASSES_BESIDE = 20
PARAMS = WireParams(
    max_tokens=1 << 30, min_tokens=0, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop_token_ids=(), ignore_eos=True,
    skip_special_tokens=True,
)  # fmt: skip


class Measuring:
    """What is measured, one after the other."""

    def __init__(self, owner: Calibrator, setup: Setup) -> None:
        self._owner, self._setup = owner, setup
        self._spec: ModelSpec = setup.spec
        self._plan = setup.plan
        self._kinds = layer_kinds(self._spec)
        self._num_slots = len(self._plan.slot_offsets) - 1
        self._until = time.monotonic() + SECONDS
        self._tables = PageTable(self._plan.num_pages, self._plan.kv_groups, self._plan.attention_workers)

    def run(self) -> Times:
        owner, plan = self._owner, self._plan
        owner.give_time(600)
        before = self._plain_reads()
        loads = self._load()
        disk = (before + self._plain_reads()) / 2
        uploads = self._upload() if plan.staged else {}
        kinds = ("raw",) if plan.staged else ("raw", "packed")
        passes, pieces, both = list[PassTimes](), list[PassTimes](), list[PassTimes]()
        self._until = time.monotonic() + SECONDS
        for number, order in enumerate(kinds):
            if order == "packed":
                self._pack()
            budget = (self._until - time.monotonic()) / (len(kinds) - number)
            passes += self._passes(order, time.monotonic() + budget)
            if self._spec.states:  # prompts go through them one by one, and single rows by themselves
                pieces += self._mixed(order, PIECES)
                both += self._mixed(order, BOTH)
        overlapping = self._overlapping(kinds[-1])
        beside, projections = self._beside_loads(passes), shares_apart(self._spec, plan.projection_layers)
        of_kinds = {self._kinds[layer]: share for layer, share in projections.items()}
        return Times(tuple(passes), beside, loads, uploads, overlapping, of_kinds, tuple(pieces), tuple(both), disk)

    # ------------------------------------------------------------------------------------------------ weights

    def _slot(self, layer: int) -> int:
        """Where weights of its kind are."""
        if layer < self._num_slots - 1:
            return layer
        same = [other for other in range(self._num_slots - 1) if self._kinds[other] == self._kinds[layer]]
        return same[layer % len(same)] if same else 0

    def _plain_reads(self) -> float:
        """Bytes per second; 0 where weights come from no file. Disks drift, so it is measured next to what is compared
        with it."""
        files = [Path(file) for file in self._spec.files]
        return read_rate(files, DISK_SECONDS)[0] if files else 0.0

    def _load(self) -> dict[int, tuple[float, ...]]:
        """Of LOADS into a slot the last counts, but of what is outside the layers."""
        owner, spec = self._owner, self._spec
        found: dict[int, list[list[float]]] = {}
        units = [(layer, layer, self._kinds[layer]) for layer in range(min(self._num_slots, spec.num_layers))]
        units.append((spec.num_layers, len(self._plan.slot_offsets) - 1, -1))
        for unit, slot, kind in units:
            found.setdefault(kind, [[], []])[0].append(owner.load(unit, slot))
        spare = units[-2:-1]
        for unit, slot, kind in (*spare, *units[:-2]):  # the spare slot is loaded into again later
            if len(found[kind][1]) < LOADED_AGAIN:
                found[kind][1].append([owner.load(unit, slot) for _ in range(LOADS - 1)][-1])
        for number in range(len(self._plan.projection_layers)):
            owner.load(spec.num_layers + 1 + number, len(self._plan.slot_offsets) + number)
        return {kind: tuple(again or first) for kind, (first, again) in found.items()}

    def _upload(self) -> dict[int, float]:
        owner, plan, spec = self._owner, self._plan, self._spec
        owner.upload(spec.num_layers, len(plan.slot_offsets) - 1, plan.device_slots)
        found: dict[int, float] = {}
        of_kinds = [self._kinds.index(kind) for kind in dict.fromkeys(self._kinds)]
        used = range(min(plan.device_slots, self._num_slots))  # by passes
        for layer in (*of_kinds, *used):
            for _ in range(2):
                found[self._kinds[layer]] = owner.upload(layer, self._slot(layer), layer % plan.device_slots)
        return found

    def _pack(self) -> None:
        """All layers: those that have no slot of their own lie in the order that another's are put in."""
        done: set[int] = set()
        owner, spec = self._owner, self._spec
        for layer in range(spec.num_layers):
            slot = self._slot(layer)
            owner.pack(layer, slot, slot in done)
            done.add(slot)
        owner.pack(spec.num_layers, len(self._plan.slot_offsets) - 1, False)

    # ------------------------------------------------------------------------------------------------ passes

    def _passes(self, order: str, until: float) -> list[PassTimes]:
        most, sequences = self._setup.exchange.max_tokens, self._plan.max_sequences
        whole = order == "packed" or self._plan.staged
        context, short = min(SHORT_CONTEXT, self._spec.max_length - 2), min(SHORT_PROMPT, self._spec.max_length)
        states = STATES_BYTES // (2 * self._spec.state_bytes) if self._spec.states else sequences
        shapes = [
            PassShape(order, (n,), context, ())
            for n in SINGLES
            if n <= min(most, sequences, max(LEAST_STATES, states)) and self._has_pages(n, context + 1)
        ]
        singles = len(shapes)
        for rows in PROMPT_ROWS:
            each = min(rows, short)
            if rows <= most and self._has_pages(rows // each, each):
                shapes.append(PassShape(order, (0,), 0, ((each,) * (rows // each),)))
        longest = max((shape.prompts[0] for shape in shapes[singles:] if shape.prompts), key=sum, default=(0,))
        long = min(sum(longest), LONG_CONTEXT, self._spec.max_length)
        if long > short and self._has_pages(1, long):
            shapes.append(PassShape(order, (0,), 0, ((long,),)))
        found = []
        needed = [shape for shape in shapes if shape.singles[0] in NEEDED or sum(map(sum, shape.prompts)) in NEEDED]
        needed += [shape for shape in (shapes[singles - 1], shapes[-1]) if shape not in needed]
        for shape in (*needed, *(shape for shape in shapes if shape not in needed)):
            if time.monotonic() > until and shape not in needed:
                continue
            columns = len(self._spec.columns) + 1 if whole and shape.singles[0] in WHOLE else None
            found.append(self.measure(shape, columns))
        for shape in (shapes[singles - 1], shapes[-1]):
            found.append(self.measure(shape, self._columns(MANY_ROWS + 1), times=1, by_layer=True))
        if whole:
            measured = [shape.singles[0] for shape in shapes[:singles] if shape.singles[0] <= LONG_SEQUENCES]
            count = max((n for n in measured if self._longest_context(n) >= LONG_CONTEXT), default=measured[0])
            context = self._longest_context(count)
            if context > 2 * SHORT_CONTEXT:
                found.append(self.measure(PassShape(order, (count,), context, ()), None))
        return found

    def _has_pages(self, sequences: int, tokens: int) -> bool:
        table = self._tables
        each = -(-sequences // table.num_workers)
        return all(table.pages_for(tokens, tokens) * each <= table.size(w) for w in range(table.num_workers))

    def _longest_context(self, count: int) -> int:
        """Of so many sequences; their K and V are no more than is touched in a moment."""
        of_token = max(1, sum(self._setup.kv_bytes_by_window.values()))
        context = min(LONG_CONTEXT, self._spec.max_length - 2)
        while context > SHORT_CONTEXT and (
            not self._has_pages(count, context + 1) or count * context * of_token > KV_BYTES
        ):
            context //= 2
        return context

    def _columns(self, rows: int) -> int:
        most = columns_to_measure(self._spec, MOST_COLUMNS)
        if rows > MANY_ROWS:
            return min(len(self._spec.columns), max(most, FEW_COLUMNS))
        layers = self._num_slots - 1
        with_slots = sum(1 for layer in self._spec.columns if layer < max(1, layers))
        return max(most, min(len(self._spec.columns), with_slots))

    def measure(self, shape: PassShape, columns: int | None, times: int = 2, by_layer: bool = False) -> PassTimes:
        """The last of some runs: the first one finds caches empty and programs not made."""
        batches = self._batches(shape)
        rows = sum(batch.num_rows for batch in batches)
        columns = self._to_end_of_layer(columns or self._columns(rows))
        spec = self._spec
        slots = [self._device_or_slot(spec.columns[c]) if c < len(spec.columns) else -1 for c in range(columns)]
        found, ordered = self._owner.run_pass(batches, slots, self._setup, by_layer)
        length = max(end for _, end in found.segments.values()) - ordered
        if length < LONGEST_PASS * 1e9:
            for _ in range(times - 1):
                found, ordered = self._owner.run_pass(batches, slots, self._setup, by_layer)
        return _times_of(shape, found, ordered, columns, len(batches), by_layer)

    def _to_end_of_layer(self, columns: int) -> int:
        """A micro-batch that has no more to do goes on to the next layer's entry, which must be there; behind the last
        layer comes the end of the model."""
        layers = self._spec.columns
        while columns < len(layers) and layers[columns] == layers[columns - 1]:
            columns += 1
        return columns if columns < len(layers) else len(layers) + 1

    def _device_or_slot(self, layer: int) -> int:
        return layer % self._plan.device_slots if self._plan.staged else self._slot(layer)

    def _batches(self, shape: PassShape) -> list[MicroBatch]:
        table = PageTable(self._plan.num_pages, self._plan.kv_groups, self._plan.attention_workers)
        batches, number, draw = [], 0, random.Random(0)
        prompts = shape.prompts or ((),) * len(shape.singles)
        for singles, lengths in zip(shape.singles, prompts, strict=True):
            batch = MicroBatch()
            for length, stored in [(shape.context + 1, shape.context)] * singles + [(n, 0) for n in lengths]:
                tokens = [draw.randrange(self._spec.vocab_size) for _ in range(length)]  # for experts of all kinds
                request = RunningRequest(number, tokens, length, PARAMS, 0, frozenset())
                request.worker = number % table.num_workers
                pages = table.allocate(number, request.worker, length, length)
                assert pages is not None, f"no pages for {length} tokens"
                request.stored = stored
                request.pages = (table.grow(number, stored, length) if stored else pages) or pages
                if self._spec.states:
                    request.state = number % self._plan.max_sequences
                batch.add(Piece(request, length - stored))
                number += 1
            batches.append(batch)
        return batches

    def _mixed(self, order: str, shapes: Sequence[tuple[int, tuple[int, ...]]]) -> list[PassTimes]:
        """Of these, what a pass has room for."""
        context = min(SHORT_CONTEXT, self._spec.max_length - 2)
        rows, sequences = self._setup.exchange.max_tokens, self._plan.max_sequences
        return [
            self.measure(PassShape(order, (singles,), context, (prompts,)), None)
            for singles, prompts in shapes
            if singles + sum(prompts) <= rows and singles + len(prompts) <= sequences
        ]

    def _overlapping(self, order: str) -> tuple[tuple[PassTimes, PassTimes], ...]:
        """Two micro-batches, one of which attends while the other's products are computed, and one alone."""
        if self._setup.exchange.num_regions < 2:
            return ()
        count = min(OVERLAPPING, self._plan.max_sequences // 2, self._setup.exchange.max_tokens)
        context = self._longest_context(2 * count)
        found = []
        for _ in range(2):
            alone = self.measure(PassShape(order, (count,), context, ()), None, times=1)
            found.append((alone, self.measure(PassShape(order, (count, count), context, ()), None, times=1)))
        return tuple(found)

    def _beside_loads(self, passes: Sequence[PassTimes]) -> BesideLoads:
        """Some passes, with nothing beside them and while the loader reads."""
        order = passes[-1].shape.order
        few = [one for one in passes if one.shape.order == order and one.shape.singles in ((4,), (16,), (64,))]
        many = [one for one in passes if one.shape.order == order and 256 <= sum(map(sum, one.shape.prompts)) <= 1024]
        spare = self._num_slots - 1
        unit = min(spare, self._spec.num_layers - 1)
        pairs: list[tuple[PassTimes, PassTimes]] = []
        loads_alone: list[float] = []
        loads: list[tuple[float, ...]] = []
        for one in (*few, *many[:1]):
            for _ in range(2):  # in turns, for a machine's speed drifts
                alone = self.measure(one.shape, len(one.segments), times=1)
                taken = [self._owner.load(unit, spare) for _ in range(2)]
                loads_alone += taken
                length = sum(map(sum, alone.segments)) + sum(map(sum, alone.attention))
                times = min(MOST_PASSES_BESIDE, -(-LOADS_BESIDE * min(taken) // max(length, 1e-3)))
                stop = self._owner.load_on_and_on(unit, spare)
                other = self.measure(one.shape, len(one.segments), times=max(1, int(times)))
                loads.append(tuple(stop()))
                pairs.append((alone, other))
        return BesideLoads(tuple(pairs), tuple(loads_alone), tuple(loads))


def _times_of(shape: PassShape, found: PassSpans, ordered: int, columns: int, count: int, by_layer: bool) -> PassTimes:
    segments = tuple(
        tuple((found.segments[c, k][1] - found.segments[c, k][0]) / 1e9 for k in range(count)) for c in range(columns)
    )
    spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for (column, k, _), span in found.attention.items():
        spans.setdefault((column, k), []).append(span)
    attention = tuple(
        tuple(max((end - start for start, end in spans.get((c, k), ())), default=0) / 1e9 for k in range(count))
        for c in range(columns)
    )
    hops = []
    if count == 1:
        for column in range(columns - 1):
            if (column, 0) in spans:
                waited = found.segments[column + 1, 0][0] - found.segments[column, 0][1]
                hops.append(waited / 1e9 - attention[column][0])
    first = min(start for start, _ in found.segments.values())
    last = max(end for _, end in (*found.segments.values(), *found.attention.values()))
    hop = sorted(hops)[len(hops) // 2] if hops else 0.0
    behind = tuple(_share_behind(found, column) for column in range(columns)) if by_layer else ()
    overlap = _common(list(found.segments.values()), list(found.attention.values())) / 1e9 if count > 1 else 0.0
    return PassTimes(
        shape, segments, attention, max(0.0, hop), (first - ordered) / 1e9, behind, overlap, (last - ordered) / 1e9
    )


def _common(some: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> int:
    """Time in which one of both kinds of spans runs. Of the first, none overlap; of the others perhaps."""
    merged: list[list[int]] = []
    for start, end in sorted(others):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    return sum(max(0, min(end, stop) - max(start, begin)) for start, end in some for begin, stop in merged)


def _share_behind(found: PassSpans, column: int) -> float:
    if (column, 0) not in found.left:
        return 0.0
    (begin, middle), (start, end) = found.left[column, 0], found.segments[column, 0]
    return (middle - begin) / max(1, middle - begin + end - start)

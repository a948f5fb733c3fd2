"""Rates from what calibration has seen. Pure logic."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median

from flexgen_lite.cost.kinds import OUTSIDE, column_kinds, layer_kinds, segment_kinds
from flexgen_lite.cost.measured import PassTimes, Times
from flexgen_lite.cost.rates import ON_HOST, PACKED, RAW, AttentionRates, Curve, Rates, SegmentRates
from flexgen_lite.memory.projection_units import MOST_PROMPT_ROWS
from flexgen_lite.model.spec import AttentionSpec, ModelSpec

WORTH_OVERLAP = 0.3  # of a lane's time, for something to be seen in it
LEAST_KEPT = 0.1
PIECE_ROWS = 64  # of the prompts that are measured
LEAST = 1e-7  # seconds; of what came out as nothing
TURN = (0.8e-3, 12e-6)  # seconds of the coordinator between passes, and of each sequence in them


def pairs(spec: AttentionSpec, first: int, rows: int) -> float:
    """Of rows `first` .. of a sequence and the tokens that they see."""

    def up_to(count: int) -> float:
        """Of all rows before row `count`."""
        if spec.attention_chunk:
            whole, rest = divmod(count, spec.attention_chunk)
            return whole * spec.attention_chunk * (spec.attention_chunk + 1) / 2 + rest * (rest + 1) / 2
        window = min(count, spec.sliding_window or count)
        return window * (window + 1) / 2 + (count - window) * window

    return up_to(first + rows) - up_to(first)


def rates_of(spec: ModelSpec, times: Times) -> Rates:
    """Raises ValueError where something is missing."""
    alone = [one for one in times.passes if len(one.shape.singles) == 1]
    if not alone:
        raise ValueError("no pass was measured")
    kinds = column_kinds(spec)
    whole = [one for one in alone if not one.behind]
    pair = {kind: _pair(spec, kinds, kind, whole) for kind in set(kinds)}
    uploads = {kind: seconds / (1 - times.projections.get(kind, 0.0)) for kind, seconds in times.uploads.items()}
    copies = {kind: share * uploads.get(kind, 0.0) for kind, share in times.projections.items()}
    segments = {
        f"{order} {before}>{after}": rates
        for order, passes in _by_order(spec, alone, copies).items()
        for before, after in dict.fromkeys(segment_kinds(spec)[:-1])
        if (rates := _segment(spec, (before, after), passes, pair, order == RAW and bool(copies)))
    }
    segments = {name: _with_pieces(spec, name, rates, times) for name, rates in segments.items()}
    if not segments:
        raise ValueError("no segment was measured with single rows and with prompts")
    decode = [one for one in whole if one.shape.singles[0]]
    ends = [(float(one.shape.singles[0]), one.segments[-1][0]) for one in decode if _is_whole(spec, one)]
    begins = _rising((float(one.shape.singles[0]), one.begin) for one in decode)
    return Rates(
        segments=segments,
        pair=pair,
        head=Curve(_rising(ends)) if ends else Curve(((1.0, LEAST),)),
        attention={kind: _attention(spec, kinds, kind, whole) for kind in set(kinds)},
        load=_loads(spec, times),
        upload=uploads,
        begin=Curve(begins) if begins else Curve(((1.0, LEAST),)),
        turn=TURN,
        attends_beside_disk=_attends_beside_disk(times),
        reads_beside_compute=_reads_beside_compute(times),
        computes_beside_disk=_computes_beside_disk(times),
        computes_beside_attention=_kept(times, lambda one: one.segments),
        attends_beside_compute=_kept(times, lambda one: one.attention),
        disk=times.disk,
    )


def _by_order(spec: ModelSpec, passes: Sequence[PassTimes], copies: Mapping[int, float]) -> dict[str, list[PassTimes]]:
    """By what decides how segments are computed. Where projections are computed on the CPU, they are in passes with few
    rows of prompts; in others they are copied to the device first, which is taken off.

    Args:
        copies: seconds that they take of a layer, by its kind; empty: none are computed there.
    """
    if not copies:
        return {order: [one for one in passes if one.shape.order == order] for order in (PACKED, RAW)}
    kinds, first = layer_kinds(spec), {spec.columns.index(layer): layer for layer in set(spec.columns)}
    taken = [copies.get(kinds[first[c]], 0.0) if c in first else 0.0 for c in range(len(spec.columns) + 1)]
    found: dict[str, list[PassTimes]] = {ON_HOST: [], RAW: []}
    for one in passes:
        if sum(map(sum, one.shape.prompts)) <= MOST_PROMPT_ROWS:
            found[ON_HOST].append(one)
            continue
        less = tuple((max(LEAST, part[0] - copy),) for part, copy in zip(one.segments, taken, strict=False))
        found[RAW].append(replace(one, segments=less))
    return found


def _is_whole(spec: ModelSpec, one: PassTimes) -> bool:
    return len(one.segments) > len(spec.columns)


def _rows(one: PassTimes) -> int:
    return one.shape.singles[0] + sum(map(sum, one.shape.prompts))


def _pairs_of(spec: ModelSpec, kinds: Sequence[int], kind: int, one: PassTimes) -> float:
    attention = spec.attention[kinds.index(kind)]
    return sum(pairs(attention, 0, rows) for lengths in one.shape.prompts for rows in lengths)


def _columns_behind(kinds: Sequence[int], kind: int, count: int) -> list[int]:
    """Segments behind a column of the kind, whose end is no end of the model."""
    return [column + 1 for column in range(min(count - 1, len(kinds) - 1)) if kinds[column] == kind]


def _pair(spec: ModelSpec, kinds: Sequence[int], kind: int, passes: Sequence[PassTimes]) -> float:
    """From two passes of as many rows, of short prompts and of a long one."""
    if kinds.index(kind) in spec.stops:
        return 0.0
    found = []
    prompts = [one for one in passes if not one.shape.singles[0]]
    for one in prompts:
        for other in prompts:
            same = one.shape.order == other.shape.order and _rows(one) == _rows(other)
            beyond = _pairs_of(spec, kinds, kind, one) - _pairs_of(spec, kinds, kind, other)
            if not same or beyond <= 0:
                continue
            columns = _columns_behind(kinds, kind, min(len(one.segments), len(other.segments)))
            if columns:
                taken = median(one.segments[c][0] for c in columns) - median(other.segments[c][0] for c in columns)
                found.append(max(0.0, taken / beyond))
    return median(found) if found else 0.0


def _segment(
    spec: ModelSpec,
    kind: tuple[int, int],
    passes: Sequence[PassTimes],
    pair: Mapping[int, float],
    of_prompts: bool = False,
) -> SegmentRates | None:
    """`of_prompts`: there are no passes of single rows alone; theirs are taken to be as those of prompts."""
    kinds, of_segments = column_kinds(spec), segment_kinds(spec)
    behind: list[float] = []
    prompt: list[tuple[float, float]] = []
    decode: list[tuple[float, float]] = []
    for one in passes:
        columns = [c for c in range(min(len(one.segments), len(of_segments) - 1)) if of_segments[c] == kind]
        if not columns:
            continue
        if one.behind:
            behind += [one.behind[c] for c in columns]
            continue
        seconds = median(one.segments[c][0] for c in columns)
        if one.shape.singles[0]:
            decode.append((_rows(one), seconds))
        else:
            less = 0.0 if kind[0] == OUTSIDE else pair[kind[0]] * _pairs_of(spec, kinds, kind[0], one)
            prompt.append((_rows(one), max(LEAST, seconds - less)))
    if of_prompts:
        decode = prompt
    if not (prompt and decode):
        return None
    share = {"behind": median(behind)} if behind else {}
    return SegmentRates(Curve(_rising(prompt)), Curve(_rising(decode)), **share)


def _with_pieces(spec: ModelSpec, name: str, rates: SegmentRates, times: Times) -> SegmentRates:
    """With what short prompts, and single rows beside a prompt, take more."""

    def more(one: PassTimes) -> list[float]:
        singles, prompts = one.shape.singles[0], one.shape.prompts[0]
        expected = rates.seconds(singles, sum(prompts))
        columns = [c for c in range(len(one.segments) - 1) if f"{one.shape.order} {kinds[c][0]}>{kinds[c][1]}" == name]
        return [one.segments[c][0] - expected for c in columns]

    kinds = segment_kinds(spec)
    pieces = [seconds / pieces_of(one.shape.prompts[0]) for one in times.pieces for seconds in more(one)]
    both = [seconds for one in times.both for seconds in more(one)]
    return replace(
        rates,
        piece=max(0.0, median(pieces)) if pieces else 0.0,
        both=max(0.0, median(both)) if both else 0.0,
    )


def pieces_of(prompts: Sequence[int]) -> int:
    """Parts of at most PIECE_ROWS that prompts of so many rows come in, beyond what one prompt of all rows would."""
    return sum(-(-rows // PIECE_ROWS) for rows in prompts) - -(-sum(prompts) // PIECE_ROWS)


def _rising(points: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The median of each number of rows, in order, and no less time for more of them."""
    of_rows: dict[float, list[float]] = {}
    for rows, seconds in points:
        of_rows.setdefault(rows, []).append(seconds)
    found: list[tuple[float, float]] = []
    for rows, times in sorted(of_rows.items()):
        found.append((rows, max(median(times), found[-1][1] if found else LEAST)))
    return tuple(found)


def _attention(spec: ModelSpec, kinds: Sequence[int], kind: int, passes: Sequence[PassTimes]) -> AttentionRates:
    column = kinds.index(kind)
    if column in spec.stops:
        return AttentionRates(0.0, 0.0, 0.0, 0.0)
    window = spec.attention[column].sliding_window

    def seconds(one: PassTimes) -> float:
        columns = [c for c in range(min(len(one.attention), len(kinds))) if kinds[c] == kind]
        return median(one.attention[c][0] for c in columns) if columns else 0.0

    def tokens(one: PassTimes) -> float:
        seen = one.shape.context + 1
        return one.shape.singles[0] * (min(seen, window) if window else seen)

    decode = sorted((one for one in passes if one.shape.singles[0]), key=tokens)
    stores = [one for one in passes if not one.shape.singles[0]]
    longest = decode[-1]
    short = [one for one in decode if one.shape.context < longest.shape.context]
    same = [one for one in short if one.shape.singles == longest.shape.singles]
    token = 0.0
    if same and tokens(longest) > tokens(same[-1]):
        token = max(0.0, (seconds(longest) - seconds(same[-1])) / (tokens(longest) - tokens(same[-1])))
    few, many = short[0] if short else decode[0], short[-1] if short else decode[-1]
    more = many.shape.singles[0] - few.shape.singles[0]
    rest = seconds(many) - seconds(few) - token * (tokens(many) - tokens(few))
    sequence = max(0.0, rest / more) if more else 0.0
    call = max(LEAST, seconds(few) - token * tokens(few) - sequence * few.shape.singles[0])
    row = 0.0
    if stores:
        most = max(stores, key=_rows)
        row = max(0.0, (seconds(most) - call) / _rows(most))
    hops = [one.hop for one in passes if one.shape.singles[0] in range(1, 33)]
    return AttentionRates(call + (median(hops) if hops else 0.0), sequence, token, row)


def _loads(spec: ModelSpec, times: Times) -> dict[int, float]:
    """Kinds that had no slot are read as fast as the slowest of the others."""
    sizes = {kind: unit.num_bytes for kind, unit in zip((*layer_kinds(spec), OUTSIDE), spec.units, strict=True)}
    found = {kind: median(seconds) / (1 - times.projections.get(kind, 0.0)) for kind, seconds in times.loads.items()}
    slowest = max((seconds / sizes[kind] for kind, seconds in found.items()), default=0.0)
    return {kind: found.get(kind, slowest * size) for kind, size in sizes.items()}


def _attends_beside_disk(times: Times) -> float:
    ratios = [
        _ratio(alone.attention, beside.attention)
        for alone, beside in times.beside.passes
        if alone.shape.singles[0] and any(part[0] for part in alone.attention)
    ]
    return min(1.0, median(ratios)) if ratios else 1.0


def _kept(times: Times, lane: Callable[[PassTimes], Sequence[Sequence[float]]]) -> float:
    """Share of its speed that a lane keeps while the other one works: what it took longer, it took in the time in which
    both did."""
    shares = []
    for alone, several in times.overlapping:
        count = len(several.shape.singles)
        expected, taken = count * sum(map(sum, lane(alone))), sum(map(sum, lane(several)))
        if several.overlap > WORTH_OVERLAP * expected > 0:
            shares.append(1 - (taken - expected) / several.overlap)
    return min(1.0, max(LEAST_KEPT, median(shares))) if shares else 1.0


def _reads_beside_compute(times: Times) -> float:
    """What it keeps in the time in which they run: at their ends, and while messages are on their way, it has all."""
    beside, shares = times.beside, []
    for (_, one), loads in zip(beside.passes, beside.loads, strict=True):
        if loads and one.busy > WORTH_OVERLAP:
            kept = median(beside.loads_alone) / (sum(loads) / len(loads))
            shares.append((kept - (1 - one.busy)) / one.busy)
    return min(1.0, max(LEAST_KEPT, median(shares))) if shares else 1.0


def _computes_beside_disk(times: Times) -> tuple[tuple[float, float], ...]:
    found: dict[float, list[float]] = {}
    for alone, beside in times.beside.passes:
        found.setdefault(_rows(alone), []).append(_ratio(alone.segments, beside.segments))
    return tuple((rows, min(1.0, median(shares))) for rows, shares in sorted(found.items()))


def _ratio(alone: Sequence[Sequence[float]], beside: Sequence[Sequence[float]]) -> float:
    return sum(map(sum, alone)) / max(LEAST, sum(map(sum, beside)))

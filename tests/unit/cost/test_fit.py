"""What times come to: rates that they were made of are found again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_lite.cost.fit import pairs, pieces_of, rates_of
from flexgen_lite.cost.kinds import OUTSIDE, columns_to_measure, layer_kinds, segment_kinds
from flexgen_lite.cost.measured import BesideLoads, PassShape, PassTimes, Times
from flexgen_lite.model.spec import AttentionSpec, ModelSpec, TensorSpec, UnitSpec

PAIR, TOKEN, SEQUENCE, ROW, CALL = 1e-8, 2e-8, 3e-6, 4e-7, 5e-4


def attention(window: int | None = None) -> AttentionSpec:
    return AttentionSpec(4, 2, 64, 64, 0.125, window, None, False)


def model(widths: tuple[int, ...], windows: tuple[int | None, ...], stops: tuple[int, ...] = ()) -> ModelSpec:
    """A layer for each width, with one column."""
    units = [
        UnitSpec(f"layer {i}", (TensorSpec("w", "bfloat16", (width, 8), 0, 16 * width, ()),), (), (), 4096)
        for i, width in enumerate(widths)
    ]
    count = len(widths)
    return ModelSpec(
        model_type="m", class_name="M", dtype="bfloat16", num_layers=count, vocab_size=100, hidden_size=64,
        intermediate_size=64, max_length=4096, eos_token_ids=(), bos_token_id=None, num_parameters=1, files=(),
        stamps=(), units=(*units, UnitSpec("outside", (), (), (), 4096)), columns=tuple(range(count)),
        attention=tuple(attention(window) for window in windows), kv_columns=tuple(range(count)), stops=stops,
    )  # fmt: skip


def test_kinds_are_counted_as_they_come() -> None:
    spec = model((8, 16, 16, 8, 16), (None, None, 32, None, None))
    assert layer_kinds(spec) == (0, 1, 1, 0, 1)
    assert segment_kinds(spec) == ((OUTSIDE, 0), (0, 1), (1, 2), (2, 0), (0, 1), (1, OUTSIDE))
    assert columns_to_measure(spec, 16) == 4
    assert columns_to_measure(spec, 3) == 3


@pytest.mark.parametrize(
    ("window", "chunk", "first", "rows", "expected"),
    [
        (None, None, 0, 4, 10),
        (None, None, 2, 2, 7),
        (2, None, 0, 4, 7),  # 1 + 2 + 2 + 2
        (2, None, 3, 1, 2),
        (None, 3, 0, 7, 13),  # 6 + 6 + 1
    ],
)
def test_pairs(window: int | None, chunk: int | None, first: int, rows: int, expected: float) -> None:
    spec = AttentionSpec(1, 1, 1, 1, 1.0, window, None, False, chunk)
    seen = sum(
        position + 1 - max((position // chunk * chunk) if chunk else 0, position + 1 - window if window else 0)
        for position in range(first, first + rows)
    )
    assert pairs(spec, first, rows) == seen == expected


def made(spec: ModelSpec, order: str, singles: int, context: int, prompts: tuple[int, ...], whole: bool) -> PassTimes:
    """Of a machine with the rates above: 1 ms and 10 us a row for a segment, twice that for single rows."""
    rows = sum(prompts)
    count = len(spec.columns)
    segments = []
    for column in range(count + whole):
        seconds = 2e-3 + 20e-6 * singles if singles else 1e-3 + 10e-6 * rows
        if column:
            seconds += PAIR * sum(pairs(spec.attention[column - 1], 0, length) for length in prompts)
        segments.append((seconds if column < count else 7e-3 + 1e-5 * singles,))
    attends = CALL + SEQUENCE * singles + TOKEN * singles * (context + 1) + ROW * rows
    shape = PassShape(order, (singles,), context, (prompts,) if prompts else ())
    return PassTimes(shape, tuple(segments), ((attends,),) * count, 0.0, 1e-4)


def test_rates_are_found_again() -> None:
    spec = model((8, 8, 8), (None, None, None))
    passes = [made(spec, "packed", n, 32, (), n in (1, 16)) for n in (1, 4, 16, 64)]
    passes += [made(spec, "packed", 0, 0, (64,) * n, False) for n in (1, 4, 16)]
    passes += [made(spec, "packed", 0, 0, (1024,), False), made(spec, "packed", 64, 1024, (), False)]
    beside = BesideLoads(((passes[2], passes[2]),), (1.0, 1.0), ((2.0, 2.0),))
    found = rates_of(spec, Times(tuple(passes), beside, {0: (1.0, 1.0)}, {}))
    assert found.pair == {0: pytest.approx(PAIR)}
    one = found.attention[0]
    assert (one.token, one.sequence, one.row) == pytest.approx((TOKEN, SEQUENCE, ROW), rel=1e-6)
    assert one.call == pytest.approx(CALL)
    segment = found.segment(True, (0, 0))
    assert segment.seconds(0, 300) == pytest.approx(1e-3 + 10e-6 * 300, rel=1e-6)
    assert segment.seconds(32, 0) == pytest.approx(2e-3 + 20e-6 * 32, rel=1e-6)
    assert found.head.at(16) == pytest.approx(7e-3 + 16e-5)
    assert found.reads_beside_compute == 0.5
    assert found.load == {0: 1.0, OUTSIDE: 1.0}, "as fast as the slowest of the others"


def test_what_lanes_take_from_each_other_is_taken_from_the_time_that_they_share() -> None:
    spec = model((8, 8, 8), (None, None, None))
    alone = made(spec, "packed", 16, 32, (), True)
    alone = replace(alone, attention=alone.segments[:3])
    both = replace(
        alone,
        shape=replace(alone.shape, singles=(16, 16)),
        segments=tuple((1.25 * one, 1.25 * one) for (one,) in alone.segments),
        attention=tuple((2 * one, 2 * one) for (one,) in alone.attention),
        overlap=2 * sum(map(sum, alone.attention)) * 2,  # all of it
    )
    passes = [made(spec, "packed", n, 32, (), True) for n in (1, 16)]
    passes += [made(spec, "packed", 0, 0, (8,) * 16, False), made(spec, "packed", 0, 0, (128,), False)]
    beside = BesideLoads((), (), ())
    found = rates_of(spec, Times(tuple(passes), beside, {0: (1.0,)}, {}, ((alone, both),)))
    assert found.attends_beside_compute == pytest.approx(0.5)
    expected = 1 - 0.5 * sum(map(sum, alone.segments)) / both.overlap
    assert found.computes_beside_attention == pytest.approx(expected) and expected > 0.5
    less = replace(both, overlap=1e-6)
    found = rates_of(spec, Times(tuple(passes), beside, {0: (1.0,)}, {}, ((alone, less),)))
    assert (found.attends_beside_compute, found.computes_beside_attention) == (1.0, 1.0), "nothing to be seen"


def test_windows_are_counted_in_pairs_and_tokens() -> None:
    spec = model((8, 8), (16, 16))
    passes = [made(spec, "raw", n, 8, (), False) for n in (1, 16)]
    passes += [made(spec, "raw", 0, 0, (8,) * 16, False), made(spec, "raw", 0, 0, (128,), False)]
    found = rates_of(spec, Times(tuple(passes), BesideLoads((), (), ()), {0: (1.0,)}, {}))
    assert found.pair == {0: pytest.approx(PAIR)}


@pytest.mark.parametrize(
    ("prompts", "pieces"),
    [((), 0), ((64,), 0), ((64, 64), 0), ((30, 34), 1), ((16,) * 4, 3), ((100, 28), 1), ((65,), 0)],
)
def test_pieces_of_prompts(prompts: tuple[int, ...], pieces: int) -> None:
    assert pieces_of(prompts) == pieces


def test_short_prompts_and_single_rows_beside_prompts_take_more() -> None:
    spec = model((8, 8, 8), (None, None, None))
    passes = [made(spec, "raw", n, 32, (), n in (1, 16)) for n in (1, 4, 16, 64)]
    passes += [made(spec, "raw", 0, 0, (64,) * n, False) for n in (1, 4)]

    def slower(singles: int, prompts: tuple[int, ...], more: float) -> PassTimes:
        """Single rows take 1 ms and 10 us a row more than those of prompts."""
        seconds = 1e-3 + 10e-6 * (singles + sum(prompts)) + (1e-3 + 10e-6 * singles if singles else 0.0) + more
        shape = PassShape("raw", (singles,), 32, (prompts,))
        return PassTimes(shape, ((seconds,),) * 4, ((CALL,),) * 4, 0.0, 1e-4)

    times = Times(
        tuple(passes), BesideLoads((), (), ()), {0: (1.0,)}, {},
        pieces=(slower(0, (16,) * 4, 3 * 2e-3),), both=(slower(4, (60,), 5e-3), slower(16, (48,), 5e-3)),
    )  # fmt: skip
    found = rates_of(spec, times).segment(False, (0, 0))
    assert found.piece == pytest.approx(2e-3, abs=5e-4) and found.both == pytest.approx(5e-3, abs=1e-3)
    assert found.seconds(0, 64, 3) - found.seconds(0, 64) == pytest.approx(3 * found.piece)
    assert found.seconds(16, 0, 0) == pytest.approx(2e-3 + 20e-6 * 16), "single rows alone are as they were"
    plain = rates_of(spec, replace(times, pieces=(), both=())).segment(False, (0, 0))
    assert (plain.piece, plain.both) == (0.0, 0.0)


def test_nothing_measured() -> None:
    with pytest.raises(ValueError, match="no pass was measured"):
        rates_of(model((8,), (None,)), Times((), BesideLoads((), (), ()), {}, {}))

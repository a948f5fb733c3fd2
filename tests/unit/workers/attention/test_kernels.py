import threading
import time

import numpy as np
import pytest

from flexgen_lite.model.spec import AttentionSpec
from flexgen_lite.wire.arena_specs import PageRun
from flexgen_lite.wire.worker_messages import Attend, BeginAttention, KvBatch, KvSpan
from flexgen_lite.workers.attention.state import STORAGE, AttentionState
from flexgen_lite.workers.attention.warm_up import warm_up
from flexgen_lite.workers.team import Team
from tests.attention_case import Case, Sequence, decode, encode

DTYPES = [(dtype, dtype) for dtype in STORAGE] + [(dtype, "int8") for dtype in STORAGE]
PLAIN = AttentionSpec(4, 2, 16, 16, 0.25, None, None, False)


def spec_of(heads: int, kv_heads: int, dim: int, value_dim: int, **changes: object) -> AttentionSpec:
    arguments = {"sliding_window": None, "softcap": None, "sinks": False} | changes
    return AttentionSpec(heads, kv_heads, dim, value_dim, dim**-0.5, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
@pytest.mark.parametrize(
    "spec",
    [
        spec_of(4, 4, 64, 64),
        spec_of(8, 1, 128, 128, sliding_window=100),
        spec_of(6, 2, 80, 96, softcap=20.0),
        spec_of(64, 1, 8, 24, sinks=True),
        spec_of(2, 2, 576, 512),
        spec_of(3, 1, 7, 5, sliding_window=1, softcap=5.0, sinks=True),
        spec_of(4, 2, 32, 32, attention_chunk=24),
        spec_of(40, 1, 16, 16, attention_chunk=513),
        spec_of(37, 1, 576, 512, values_in_keys=True),
        spec_of(4, 1, 20, 9, values_in_keys=True, sliding_window=30),
    ],
)
def test_against_the_reference(spec: AttentionSpec, dtype: str, kv_dtype: str) -> None:
    sequences = [
        Sequence(0, 1),
        Sequence(1100, 1),
        Sequence(511, 3),
        Sequence(20, 40),
        Sequence(9, 5, attend=False),
    ]
    case = Case(spec, sequences, dtype, 16, kv_dtype=kv_dtype)
    case.run()
    case.check()


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_results_depend_neither_on_threads_nor_on_the_batch(dtype: str, kv_dtype: str) -> None:
    sequences = [Sequence(1300, 1), Sequence(40, 3), Sequence(2, 1)]
    case = Case(PLAIN, sequences, dtype, 16, kv_dtype=kv_dtype)
    together = case.run(threads=2)
    assert (together == case.run(threads=1)).all()
    assert (together == case.run(threads=5)).all()
    for span in case.spans:
        case.out.view(np.uint8)[:] = 0
        case.state.begin(BeginAttention(2, 1, (KvBatch(0, 1, (span,)),)))
        case.state.attend(Attend(2, 0, 0))
        rows = slice(span.row, span.row + span.num_rows)
        assert (case.out.view(np.uint8)[rows] == together[rows]).all()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_a_chunk_of_a_prompt_gives_what_token_by_token_gives(kv_dtype: str) -> None:
    case = Case(PLAIN, [Sequence(500, 30)], "bfloat16", 16, kv_dtype=kv_dtype)
    whole = case.run()
    span = case.spans[0]
    for i in range(span.num_rows):
        step = KvSpan(span.row + i, 1, span.position + i, True, span.pages)
        case.state.begin(BeginAttention(2, 2, (KvBatch(0, 1, (step,)),)))
        case.state.attend(Attend(2, 0, 0))
    assert (case.out.view(np.uint8) == whole).all()


@pytest.mark.parametrize(("dtype", "kv_dtype"), DTYPES)
def test_only_the_pages_and_rows_of_the_spans_are_written(dtype: str, kv_dtype: str) -> None:
    case = Case(PLAIN, [Sequence(30, 1), Sequence(0, 20, attend=False), Sequence(5, 4)], dtype, 16, kv_dtype=kv_dtype)
    before_kv, before_exchange = bytes(case.kv), bytes(case.exchange)
    case.run()
    for span, pages in zip(case.spans, case.pages, strict=False):  # put back what may change; all else is as it was
        for part in ("key", "value"):
            for t in range(span.position, span.position + span.num_rows):
                rows = case.rows(part, pages, t)
                rows[:] = np.frombuffer(b"\xff\xff\xff\xff", rows.dtype)[0]
                if kv_dtype == "int8":
                    case.scales(part, pages, t)[:] = np.frombuffer(b"\xff\xff\xff\xff", np.float32)[0]
        if span.attend:
            case.out[span.row : span.row + span.num_rows].view(np.uint8)[:] = 0xFF
    assert bytes(case.kv) == before_kv
    assert bytes(case.exchange) == before_exchange


def test_large_scores_do_not_overflow() -> None:
    spec = AttentionSpec(2, 1, 16, 16, 1000.0, None, None, True)
    case = Case(spec, [Sequence(700, 2)], "float32", 16)
    case.run()
    out = decode(case.out[1:3], "float32")
    assert np.isfinite(out).all()
    assert (np.abs(out) <= np.abs(case.values[0]).max() + 1e-6).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_output_is_rounded_to_nearest_even(dtype: str) -> None:
    # Two tokens of equal weight: the output is the mean of their values, half way between neighbours for odd
    # sums.
    case = Case(spec_of(1, 1, 8, 64), [Sequence(1, 1)], dtype, 16)
    case.q[:] = 0
    ones = encode(np.ones(1), dtype).view(np.uint16)[0]
    low, high = np.arange(64, dtype=np.uint16) + ones, np.arange(64, dtype=np.uint16) + ones + 1
    case.write("value", case.pages[0], 0, decode(low, dtype)[None])
    case.v[1, 0] = high
    case.run()
    expected = encode((decode(low, dtype) + decode(high, dtype)) / 2, dtype)
    assert (case.out[1, 0] == expected).all()


@pytest.mark.parametrize("dtype", STORAGE)
def test_a_query_just_below_a_power_of_two_has_room_in_its_bytes(dtype: str) -> None:
    case = Case(AttentionSpec(1, 1, 16, 16, 20.0, None, None, False), [Sequence(40, 1)], dtype, 16, kv_dtype="int8")
    case.q[1, 0] = encode(np.array([255 / 128, 0.0074, *[0.0] * 14]), dtype)
    case.q_RHD = decode(case.q, dtype)
    case.run()
    case.check()


def test_what_does_not_fit_is_named() -> None:
    case = Case(PLAIN, [Sequence(3, 1)], "bfloat16", 16)
    case.begin()
    for message, name in [
        (Attend(7, 0, 3), "pass 7"),
        (Attend(1, 0, 8), "micro-batch 8"),
        (Attend(1, 5, 3), "column 5"),
    ]:
        with pytest.raises(ValueError, match=name):
            case.state.attend(message)
    for span, name in [
        (KvSpan(0, 1, 0, True, (PageRun(0, (99,)),)), "page 99"),
        (KvSpan(0, 1, 0, True, (PageRun(0, (-1,)),)), "page -1"),
        (KvSpan(0, 1, 16, True, (PageRun(0, (0,)),)), "positions 16"),
        (KvSpan(0, 1, 17, True, (PageRun(1, (0,)),)), "pages hold tokens 16 .. 31"),
        (KvSpan(0, 1, 0, True, ()), "pages of 0 groups"),
        (KvSpan(3, 1, 0, True, (PageRun(0, (0,)),)), "at row 3"),
    ]:
        with pytest.raises(ValueError, match=name):
            case.state.begin(BeginAttention(2, 1, (KvBatch(0, 0, (span,)),)))
        with pytest.raises(ValueError, match="pass"):  # a begin that failed leaves no pass behind
            case.state.attend(Attend(1, 0, 3))
    with pytest.raises(ValueError, match="region 2"):
        case.state.begin(BeginAttention(2, 1, (KvBatch(0, 2, ()),)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_kernels_are_at_hand_before_there_is_an_arena(dtype: str) -> None:
    warm_up(dtype, dtype)
    warm_up(dtype, "int8")
    with pytest.raises(ValueError, match="an exchange of int8 and KV of int8: one of float32"):
        warm_up("int8", "int8")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_that_int8_cannot_hold(dtype: str) -> None:
    """Zeros stay zeros; what is not finite is not a number, as it would be without int8, and others do not see it."""
    case = Case(spec_of(2, 2, 20, 12), [Sequence(3, 1), Sequence(3, 1), Sequence(3, 1)], dtype, 16, kv_dtype="int8")
    first, second, third = (span.row for span in case.spans)
    case.k[first], case.v[first] = 0, 0
    case.k[second, 0, 3] = encode(np.array([np.inf]), dtype)[0]
    case.v[third, 0, 3] = encode(np.array([np.nan]), dtype)[0]
    case.run()
    for part in ("key", "value"):
        assert (case.read(part, case.pages[0], 3) == 0).all()
    out = decode(case.out, dtype)
    assert np.isfinite(out[first]).all()
    for row in (second, third):
        assert np.isnan(out[row, 0]).all() and np.isfinite(out[row, 1]).all()


def test_an_arena_too_small_is_an_error() -> None:
    case = Case(PLAIN, [Sequence(3, 1)], "float16", 16)
    with pytest.raises(ValueError, match="KV arena"):
        AttentionState(case.attach, memoryview(bytearray(8)), memoryview(case.exchange))


def test_idle_threads_take_no_time() -> None:
    case = Case(PLAIN, [Sequence(600, 1), Sequence(600, 1)], "bfloat16", 16)
    case.run(threads=4)
    start = time.process_time()
    threading.Event().wait(0.3)
    assert time.process_time() - start < 0.1


def test_an_error_in_a_team_is_raised_and_the_team_lives_on() -> None:
    team = Team(3)

    def fail(member: int) -> None:
        if member == 2:
            raise KeyError(member)

    with pytest.raises(KeyError):
        team.run(fail)
    done: list[int] = []
    team.run(done.append)
    assert sorted(done) == [0, 1, 2]
    team.close()

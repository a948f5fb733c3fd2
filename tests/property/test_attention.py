"""Random attention against float64 numpy: shapes, windows, chunks, softcaps, sinks, pages, spans, dtypes."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen_lite.model.spec import AttentionSpec
from flexgen_lite.workers.attention.state import STORAGE
from tests.attention_case import Case, Sequence

HEAD_DIMS = st.sampled_from([8, 16, 24, 64, 80, 96, 128, 256]) | st.integers(1, 40)


@st.composite
def specs(draw: st.DrawFn, head_dims: st.SearchStrategy[int] = HEAD_DIMS) -> AttentionSpec:
    kv_heads, group = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 4, 8, 33]))
    dim = draw(head_dims)
    limit = draw(st.none() | st.integers(1, 64) | st.sampled_from([511, 512, 513]))
    chunked = draw(st.booleans())
    in_keys = draw(st.booleans())
    return AttentionSpec(
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=dim,
        value_dim=draw(st.integers(1, dim) if in_keys else st.just(dim) | st.integers(1, 130)),
        values_in_keys=in_keys,
        scaling=draw(st.sampled_from([dim**-0.5, 1.0, 0.05])),
        sliding_window=None if chunked else limit,
        attention_chunk=limit if chunked else None,
        softcap=draw(st.none() | st.sampled_from([1.0, 30.0])),
        sinks=draw(st.booleans()),
    )


tokens = st.integers(0, 70) | st.sampled_from([480, 511, 512, 513, 1023, 1024, 1100])
sequences = st.builds(Sequence, tokens, st.just(1) | st.integers(1, 40), st.booleans())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    spec=specs(),
    sequences=st.lists(sequences, min_size=1, max_size=4),
    dtype=st.sampled_from(list(STORAGE)),
    in_int8=st.booleans(),
    page_tokens=st.sampled_from([16, 32, 64, 1024]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_attention_is_that_of_the_reference(
    spec: AttentionSpec, sequences: list[Sequence], dtype: str, in_int8: bool, page_tokens: int, threads: int, seed: int
) -> None:
    case = Case(spec, sequences, dtype, page_tokens, seed, threads, "int8" if in_int8 else dtype)
    first = case.run(threads)
    case.check()
    kv = bytes(case.kv)
    assert (case.run(threads) == first).all()
    assert bytes(case.kv) == kv

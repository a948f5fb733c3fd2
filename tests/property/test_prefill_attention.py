"""Attention of packed prompts on the CPU against float64: shapes, windows, softcaps, sinks, dtypes, threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen_lite.model.spec import AttentionSpec
from flexgen_lite.workers.compute.attention_call import AttentionCall
from flexgen_lite.workers.compute.prefill_attention import prompt_attention
from tests.attention_case import reference
from tests.property.test_attention import HEAD_DIMS, specs

# The output is rounded to the storage dtype once. In bfloat16 so are the weights, each by half a step at most.
STEP = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7}
KERNELS = {  # what queries of each dtype and head size are computed by, where products of pairs pay
    "float32": (torch.float32, HEAD_DIMS),
    "bfloat16-even": (torch.bfloat16, HEAD_DIMS.map(lambda dim: dim + dim % 2)),
    "bfloat16-odd": (torch.bfloat16, HEAD_DIMS.map(lambda dim: dim + 1 - dim % 2)),
}
lengths = st.integers(1, 40) | st.sampled_from([127, 128, 129, 255, 256, 257, 300])


def rounded(random: np.random.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal(shape)).to(dtype)


def make_call(
    spec: AttentionSpec, rows: int, dtype: torch.dtype, random: np.random.Generator, transposed: bool
) -> AttentionCall:
    """As a model gives it: `[1, heads, rows, width]`, of memory in that order or row by row."""

    def heads(count: int, width: int) -> torch.Tensor:
        if transposed:
            return rounded(random, dtype, 1, rows, count, width).transpose(1, 2)
        return rounded(random, dtype, 1, count, rows, width)

    sinks_H = torch.from_numpy(random.standard_normal(spec.num_heads)).to(dtype) if spec.sinks else None
    q, k, v = (
        heads(spec.num_heads, spec.head_dim),
        heads(spec.num_kv_heads, spec.head_dim),
        heads(spec.num_kv_heads, spec.value_dim),
    )
    return AttentionCall(q, k, v, spec.scaling, spec.sliding_window, spec.softcap, sinks_H, spec.attention_chunk)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(),
    prompts=st.lists(lengths, min_size=1, max_size=4),
    gap=st.integers(0, 3),
    transposed=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_prompt_attention_is_that_of_the_reference(
    kernel: str, data: st.DataObject, prompts: list[int], gap: int, transposed: bool, threads: int, seed: int
) -> None:
    dtype, head_dims = KERNELS[kernel]
    spec = data.draw(specs(head_dims))
    random = np.random.default_rng(seed)
    starts = [gap + sum(prompts[:i]) for i in range(len(prompts))]
    rows = gap + sum(prompts) + gap
    call = make_call(spec, rows, dtype, random, transposed)
    out_THE = torch.full((rows, spec.num_heads, spec.value_dim), 7.0, dtype=dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        prompt_attention(call, list(zip(starts, prompts, strict=True)), out_THE)
    finally:
        torch.set_num_threads(before)
    assert (out_THE[:gap] == 7).all() and (out_THE[rows - gap :] == 7).all(), "rows of nobody were written"
    q, k, v = (x[0].transpose(0, 1).double().numpy() for x in (call.query_BHTD, call.key_BGTD, call.value_BGTE))
    sinks_H = np.zeros(spec.num_heads) if call.sinks_H is None else call.sinks_H.double().numpy()
    for start, count in zip(starts, prompts, strict=True):
        for i in sorted({0, count // 2, count - 1, int(random.integers(count))}):
            seen = slice(start, start + i + 1)
            expected = reference(spec, q[start + i], k[seen], v[seen], sinks_H)
            error = np.abs(out_THE[start + i].double().numpy() - expected)
            allowed = STEP[dtype] * (np.abs(expected) + np.abs(v[seen]).max()) + 5e-5  # scores of 100
            np.testing.assert_array_less(error, allowed, err_msg=f"prompt at {start}, row {i} of {count}")

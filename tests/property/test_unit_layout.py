"""For any set of tensors: nothing overlaps, every direct tensor is covered, offsets are congruent."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_lite.memory.slot_layout import BLOCK_BYTES, MAX_GAP_BYTES, TensorSource, layout_unit
from flexgen_lite.model.spec import ITEM_BYTES, SourcePiece, UnitSpec

DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "int64", "bool"])


@st.composite
def sources(draw: st.DrawFn) -> list[TensorSource]:
    """Tensors of up to three files, in any order, with gaps between them and some casts and views."""
    result = []
    for file in range(draw(st.integers(1, 3))):
        offset = draw(st.integers(0, 10_000))
        for index in range(draw(st.integers(0, 8))):
            stored, wanted = draw(DTYPES), draw(DTYPES)
            wanted = draw(st.sampled_from([stored, stored, wanted]))
            shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
            num_bytes = math.prod(shape) * ITEM_BYTES[stored]
            views: tuple[tuple[str | int, ...], ...] = ()
            if draw(st.integers(0, 5)) == 0:
                views = (("reshape", *shape),)
            piece = SourcePiece(file, offset, num_bytes, f"{file}.{index}", stored, shape, views)
            result.append(TensorSource(f"{file}.{index}", wanted, shape, (piece,)))
            gap = st.sampled_from([0, 0, 1, 8, 4096, MAX_GAP_BYTES - 1, MAX_GAP_BYTES, 3 * MAX_GAP_BYTES])
            offset += num_bytes + draw(gap)
    return list(draw(st.permutations(result)))


def check(unit: UnitSpec, given_sources: list[TensorSource]) -> None:
    assert unit.num_bytes % BLOCK_BYTES == 0
    assert [(t.name, t.dtype, t.shape) for t in unit.tensors] == [(s.name, s.dtype, s.shape) for s in given_sources]

    spans = [(extent.slot_offset, extent.slot_offset + extent.num_bytes) for extent in unit.extents]
    for extent in unit.extents:
        assert extent.num_bytes > 0
        assert extent.file_offset % BLOCK_BYTES == extent.num_bytes % BLOCK_BYTES == 0
        assert (extent.slot_offset - extent.file_offset) % BLOCK_BYTES == 0
    converted = set(unit.converted)
    spans += [(unit.tensors[i].offset, unit.tensors[i].offset + unit.tensors[i].num_bytes) for i in converted]
    spans.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert all(end <= unit.num_bytes for _, end in spans)

    taken = []
    for index, tensor in enumerate(unit.tensors):
        assert tensor.offset % ITEM_BYTES[tensor.dtype] == 0
        if index in converted:
            assert tensor.offset % 64 == 0
            continue
        (piece,) = tensor.pieces
        assert piece.source_dtype == tensor.dtype and not piece.views
        (extent,) = (
            e for e in unit.extents if e.file == piece.file and 0 <= piece.offset - e.file_offset < e.num_bytes
        )
        assert piece.offset + piece.num_bytes <= extent.file_offset + extent.num_bytes
        assert tensor.offset - extent.slot_offset == piece.offset - extent.file_offset
        taken.append((tensor.offset, tensor.offset + tensor.num_bytes))
    taken.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(taken))


@settings(max_examples=300, deadline=None)
@given(sources())
def test_layout(given_sources: list[TensorSource]) -> None:
    unit = layout_unit("unit", given_sources)
    check(unit, given_sources)
    direct = {index for index, source in enumerate(given_sources) if source.direct}
    assert direct == set(range(len(given_sources))) - set(unit.converted)


@settings(max_examples=100, deadline=None)
@given(sources())
def test_little_is_read_in_vain(given_sources: list[TensorSource]) -> None:
    unit = layout_unit("unit", given_sources)
    wanted = sum(source.num_bytes for source in given_sources if source.direct)
    read = sum(extent.num_bytes for extent in unit.extents)
    assert read <= wanted + len(given_sources) * (MAX_GAP_BYTES + 2 * BLOCK_BYTES)

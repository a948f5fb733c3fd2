"""Which tensors are read straight into the slot, and where they lie."""

from __future__ import annotations

import math
from dataclasses import replace

from flexgen_lite.memory.slot_layout import TensorSource, layout_unit
from flexgen_lite.model.spec import ITEM_BYTES, Extent, SourcePiece


def source(
    name: str, offset: int, shape: tuple[int, ...] = (64,), dtype: str = "float16", file: int = 0
) -> TensorSource:
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    return TensorSource(name, dtype, shape, (SourcePiece(file, offset, num_bytes, name, dtype, shape),))


def test_neighbours_are_one_extent() -> None:
    unit = layout_unit("layer", [source("b", 5000 + 128), source("a", 5000)])
    assert unit.extents == (Extent(0, 4096, 4096, 0),)
    assert unit.converted == ()
    assert [(tensor.name, tensor.offset) for tensor in unit.tensors] == [
        ("b", 5128 - 4096),
        ("a", 5000 - 4096),
    ]
    assert unit.num_bytes == 4096


def test_small_gaps_are_read_along_and_large_ones_are_not() -> None:
    small = layout_unit("layer", [source("a", 0), source("b", 128 + 65535 // 2 * 2)])
    assert [extent.num_bytes for extent in small.extents] == [69632]
    large = layout_unit("layer", [source("a", 0), source("b", 128 + 65536)])
    assert large.extents == (Extent(0, 0, 4096, 0), Extent(0, 65536, 4096, 4096))
    assert [tensor.offset for tensor in large.tensors] == [0, 4096 + 128]


def test_files_are_separate_extents() -> None:
    unit = layout_unit("layer", [source("a", 0, file=1), source("b", 128, file=0)])
    assert unit.extents == (Extent(0, 0, 4096, 0), Extent(1, 0, 4096, 4096))


def test_converted_tensors_follow_packed() -> None:
    cast = replace(source("cast", 128), dtype="bfloat16")
    viewed = source("viewed", 256, (8, 8))
    viewed = replace(viewed, pieces=(replace(viewed.pieces[0], views=(("transpose", 0, 1),)),))
    part = source("part", 384, (2, 64))
    part = replace(part, pieces=(replace(part.pieces[0], region=((0, 1), (0, 64))),) * 2)
    odd = source("odd", 641, (3,))
    empty = TensorSource("dummy", "float32", (3,), ())
    unit = layout_unit("layer", [cast, source("direct", 0), viewed, part, odd, empty])
    assert unit.converted == (0, 2, 3, 4, 5)
    assert [tensor.offset for tensor in unit.tensors] == [4096, 0, 4224, 4352, 4608, 4672]
    assert unit.num_bytes == 8192


def test_a_region_of_the_whole_is_direct() -> None:
    whole = source("a", 0, (2, 32))
    whole = replace(whole, pieces=(replace(whole.pieces[0], region=((0, 2), (0, 32))),))
    assert layout_unit("layer", [whole]).converted == ()


def test_two_tensors_of_the_same_bytes() -> None:
    unit = layout_unit("layer", [source("a", 64), source("b", 64)])
    assert (len(unit.extents), unit.converted) == (1, (1,))


def test_scalars_and_empty_tensors() -> None:
    unit = layout_unit("layer", [source("scalar", 64, ()), source("empty", 66, (0, 4))])
    assert unit.tensors[0].offset == 64
    assert (unit.converted, unit.tensors[1].num_bytes) == ((1,), 0)


def test_no_tensors() -> None:
    assert layout_unit("layer", []).num_bytes == 0

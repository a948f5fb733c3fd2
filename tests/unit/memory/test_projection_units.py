"""A layer taken apart: what goes to the device, and the projections."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flexgen_lite.memory.projection_units import layers_with_projections, units_of
from flexgen_lite.memory.slot_layout import BLOCK_BYTES, TensorSource, layout_unit
from flexgen_lite.model.spec import AttentionSpec, ModelSpec, SourcePiece, UnitSpec

KB = 1024
CALL = AttentionSpec(4, 4, 16, 16, 0.25, None, None, False)


def source(name: str, offset: int, num_bytes: int) -> TensorSource:
    shape = (num_bytes // 2,)
    return TensorSource(name, "bfloat16", shape, (SourcePiece(0, offset, num_bytes, name, "bfloat16", shape),))


def layer(number: int) -> UnitSpec:
    """In the order of a file: norm, mlp, k, o, q, v."""
    start = number * 1024 * KB
    sizes = {"norm": KB, "mlp": 120 * KB, "k": 40 * KB, "o": 60 * KB, "q": 40 * KB, "v": 40 * KB}
    sources = []
    for name, size in sizes.items():
        sources.append(source(f"{number}.{name}", start, size))
        start += size
    return layout_unit(f"layer {number}", sources)


def spec(projections: tuple[tuple[int, ...], ...]) -> ModelSpec:
    units = (*(layer(number) for number in range(3)), layout_unit("outside", [source("head", 4096 * KB, 8 * KB)]))
    return ModelSpec(
        model_type="m", class_name="M", dtype="bfloat16", num_layers=3, vocab_size=10, hidden_size=64,
        intermediate_size=64, max_length=64, eos_token_ids=(), bos_token_id=None, num_parameters=1, files=("f",),
        stamps=(), units=units, columns=(0, 1, 2), attention=(CALL,) * 3, kv_columns=(0, 1, 2), projections=projections,
    )  # fmt: skip


QKV = (2, 4, 5)


def test_nothing_is_taken_apart_that_is_not_asked_for() -> None:
    found = spec((QKV, (), QKV))
    assert layers_with_projections(found) == (0, 2)
    assert units_of(found, ()) == found.units


def test_each_tensor_is_in_one_unit_and_comes_from_where_it_was() -> None:
    found = spec((QKV, (), QKV))
    units = units_of(found, (0, 2))
    assert len(units) == 6 and units[1] == found.units[1] and units[3] == found.units[3]
    for number, apart in ((0, 4), (2, 5)):
        whole = {tensor.name: tensor for tensor in found.units[number].tensors}
        assert [tensor.name for tensor in units[apart].tensors] == [f"{number}.{name}" for name in "kqv"]
        for tensor in (*units[number].tensors, *units[apart].tensors):
            was = whole.pop(tensor.name)
            assert replace(tensor, offset=was.offset) == was
        assert not whole


def test_a_run_of_the_file_is_read_for_one_of_them() -> None:
    """But for blocks that both have a part of; no projection is copied to the device because others are beside it."""
    found = spec((QKV, QKV, QKV))
    units = units_of(found, (0, 1, 2))
    for number in range(3):
        rest, apart = units[number], units[4 + number]
        assert apart.num_bytes == sum(extent.num_bytes for extent in apart.extents)
        assert apart.num_bytes <= 120 * KB + 4 * BLOCK_BYTES
        assert rest.num_bytes <= 181 * KB + 4 * BLOCK_BYTES
        assert not rest.converted and not apart.converted


def test_a_layer_without_projections_cannot_be_taken_apart() -> None:
    with pytest.raises(AssertionError, match="layer 1 has no projections"):
        units_of(spec((QKV, (), QKV)), (1,))

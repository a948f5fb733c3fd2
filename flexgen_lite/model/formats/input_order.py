"""Inputs whose groups are no runs: a tensor g_idx says which group each is in (GPTQ with desc_act, actorder)."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from functools import lru_cache

from flexgen_lite.model.formats.layers import AGAIN, REMEDY, StoredLayers
from flexgen_lite.model.spec import SmallSource, StoredPart
from flexgen_lite.model.stored_tensor import StoredTensor


def read_order(layers: StoredLayers, layer: str, order: StoredTensor | None, width: int, each: int) -> bytes:
    """A digest of it; b"" where groups are runs of `each` inputs after all.

    Raises:
        CheckpointError: it does not put `each` of `width` inputs in every group.
    """
    if order is None:
        return b""
    name = order.name.removeprefix(layer).lstrip(".")
    if order.dtype != "int32" or order.shape != (width,):
        raise layers.error(
            layer, order, f"has a {name} of {order.dtype} {list(order.shape)}, not {width} int32: {AGAIN}"
        )
    data = layers.read(SmallSource(order.file, order.offset, order.num_bytes, order.dtype))
    runs, none = _usual(width, each)
    if data in (runs, none):
        return b""
    counts, groups = Counter(array("i", data)), width // each
    strange = next((group for group in counts if not 0 <= group < groups), None)
    if strange is not None:
        raise layers.error(
            layer, order, f"has an input in group {strange} of {name}, and there are {groups} groups: {AGAIN}"
        )
    if any(counts[group] != each for group in range(groups)):
        raise layers.error(
            layer, order, f"has groups of different sizes in {name}, only such of {each} inputs are read: {REMEDY}"
        )
    return hashlib.blake2b(data, digest_size=16).digest()


def part_of(order: StoredTensor, columns: int) -> tuple[StoredPart, StoredTensor]:
    return StoredPart("order", "order", block=(columns, 1)), order


@lru_cache(maxsize=16)
def _usual(width: int, each: int) -> tuple[bytes, bytes]:
    """Groups that are runs, and compressed-tensors' -1 for the same."""
    return array("i", (k // each for k in range(width))).tobytes(), array("i", [-1]).tobytes() * width

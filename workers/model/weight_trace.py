"""What Transformers' weight conversions do to a checkpoint's tensors, found by running them on stand-ins.

A conversion (stack the experts, split a fused projection, permute for rotary embeddings ...) only moves
elements. A TracedTensor has a shape but no data; each operation on it notes which part of the result comes
from which stored tensor through which views. An operation that does more than move elements is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flexgen_lite.model.formats.layers import small
from flexgen_lite.model.packing import Packing
from flexgen_lite.model.spec import ITEM_BYTES, PartOfWhole, SmallSource, SourcePiece, StoredPart
from flexgen_lite.model.stored_tensor import StoredBits, StoredTensor

Region = tuple[tuple[int, int], ...]
View = tuple[str | int, ...]


class UntraceableError(Exception):
    """An operation that cannot be expressed as pieces and views."""


@dataclass(frozen=True, slots=True)
class Part:
    """`region` of a traced tensor holds `stored`, taken through `views`; one (start, stop) per dimension."""

    stored: StoredTensor
    views: tuple[View, ...]
    region: Region

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.region)


class TracedTensor(torch.Tensor):
    """A tensor without data that knows where each of its parts comes from."""

    parts: tuple[Part, ...]
    meta: torch.Tensor

    @staticmethod
    def __new__(cls, meta: torch.Tensor, parts: Sequence[Part]) -> TracedTensor:
        result = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=meta.device
        )
        result.meta = meta
        result.parts = tuple(parts)
        return result

    def __repr__(self) -> str:  # type: ignore[override]
        return f"TracedTensor({list(self.shape)}, {len(self.parts)} parts)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        rule = _RULES.get(func.overloadpacket.__name__)
        if rule is None:
            raise UntraceableError(f"it calls {func}")
        kwargs = kwargs or {}
        result = func(*_bare(args), **_bare(kwargs))
        # Every rule takes the operands and the result on the meta device; it returns the parts of each
        # output.
        outputs = rule(result, *args, **kwargs)
        if isinstance(result, torch.Tensor):
            return cls(result, outputs[0])
        return type(result)(cls(one, parts) for one, parts in zip(result, outputs, strict=True))


def trace(stored: StoredTensor, dtype: torch.dtype) -> TracedTensor:
    """A stand-in for `stored`, cast to `dtype`."""
    meta = torch.empty(stored.shape, dtype=dtype, device="meta")
    sizes = tuple((0, size) for size in stored.shape[-2:])
    if not stored.members:
        return TracedTensor(meta, (Part(stored, _unpaired(stored), tuple((0, size) for size in stored.shape)),))
    turn: tuple[View, ...] = (("transpose", 0, 1),) if stored.is_turned else ()
    views: tuple[View, ...] = (*turn, ("reshape", 1, *stored.shape[-2:]))
    parts = [Part(member, views, ((i, i + 1), *sizes)) for i, member in enumerate(stored.members)]
    return TracedTensor(meta, parts)


def _unpaired(stored: StoredTensor) -> tuple[View, ...]:
    """The halves of its runs of rows, one behind the other."""
    if not stored.paired_rows:
        return ()
    count, *rest = stored.shape
    runs = (count // stored.paired_rows, stored.paired_rows // 2, 2, *rest)
    return ("reshape", *runs), ("transpose", 1, 2), ("reshape", *stored.shape)


def to_pieces(part: Part, shape: Sequence[int], is_packed: bool = False) -> tuple[SourcePiece, ...]:
    """The part as SourcePieces of a parameter of `shape`: one, or those of a weight that is kept in few bits."""
    bits = part.stored.bits
    if bits is not None:
        return _pieces_of_bits(part, bits if is_packed or bits.is_in_one_piece else _in_one_piece(bits), shape)
    return (_to_piece(part, shape),)


def _in_one_piece(bits: StoredBits) -> StoredBits:
    """To be unpacked while it is loaded: row by row, or what is put together before."""
    if (blocks := bits.in_blocks) is not None:
        values, scale_part, scales = blocks
        whole = StoredPart("all", "fp8_blocks", 8, scale_part.block, (small(scales),))
        return replace(bits, parts=((whole, values),))
    others: list[SmallSource] = []
    for number, (part, source) in enumerate(bits.parts):
        others += [*([small(source)] if number else []), *part.others]
    members = tuple(
        PartOfWhole(part.fills, part.layout, part.num_bits, part.block, part.number, source.dtype, len(part.others))
        for part, source in bits.parts
    )
    packing = Packing(
        bits.num_bits, bits.group, "int8", bits.scale_dtype, bits.zeros, kind=bits.kind, is_sorted=bool(bits.order),
        finish=bits.finish, factors=bits.factors, factor_group=bits.factor_group, divides=bits.divides,
    )  # fmt: skip
    whole = StoredPart("all", "whole", others=tuple(others), packing=packing, members=members)
    return replace(bits, parts=((whole, bits.parts[0][1]),))


def _pieces_of_bits(part: Part, bits: StoredBits, shape: Sequence[int]) -> tuple[SourcePiece, ...]:
    whole = part.region == tuple((0, size) for size in shape)
    source_shape, views = part.stored.shape, part.views
    if part.stored.paired_rows:
        source_shape, views = tuple(int(size) for size in views[0][1:]), views[1:]
    return tuple(
        SourcePiece(
            file=source.file,
            offset=source.offset,
            num_bytes=source.num_bytes,
            source_name=source.name,
            source_dtype=source.dtype,
            source_shape=source_shape,
            views=views,
            region=() if whole else part.region,
            part=stored_part,
        )
        for stored_part, source in bits.parts
    )


def _to_piece(part: Part, shape: Sequence[int]) -> SourcePiece:
    """Leading reshapes and row slices become file offsets."""
    stored, views = part.stored, list(part.views)
    offset, source_shape = stored.offset, stored.shape
    while views:
        kind, *numbers = views[0]
        if kind == "reshape":
            source_shape = tuple(int(number) for number in numbers)
        elif kind == "slice" and math.prod(source_shape[: int(numbers[0])]) == 1:
            dim, start, stop = (int(number) for number in numbers)
            offset += start * math.prod(source_shape[dim + 1 :]) * ITEM_BYTES[stored.dtype]
            source_shape = (*source_shape[:dim], stop - start, *source_shape[dim + 1 :])
        else:
            break
        views.pop(0)
    whole = part.region == tuple((0, size) for size in shape)
    return SourcePiece(
        file=stored.file,
        offset=offset,
        num_bytes=math.prod(source_shape) * ITEM_BYTES[stored.dtype],
        source_name=stored.name,
        source_dtype=stored.dtype,
        source_shape=source_shape,
        views=tuple(views),
        region=() if whole else part.region,
    )


def _bare(value: Any) -> Any:
    if isinstance(value, TracedTensor):
        return value.meta
    if isinstance(value, (list, tuple)):
        return type(value)(_bare(item) for item in value)
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items()}
    return value


# ------------------------------------------------------------------------------------- rules, one per kind of
# operation

_Outputs = list[list[Part]]


def _same(result: torch.Tensor, x: TracedTensor, *args: Any, **kwargs: Any) -> _Outputs:
    if result.dtype != x.dtype:
        raise UntraceableError(f"it casts to {result.dtype}")
    return [list(x.parts)]


def _reshape(result: torch.Tensor, x: TracedTensor, *args: Any) -> _Outputs:
    old, new = tuple(x.shape), tuple(result.shape)
    if old == new:
        return [list(x.parts)]
    if len(x.parts) == 1 and x.parts[0].shape == old:
        part = x.parts[0]
        return [[Part(part.stored, (*part.views, ("reshape", *new)), tuple((0, size) for size in new))]]
    if [size for size in old if size != 1] != [size for size in new if size != 1]:
        raise UntraceableError(f"it reshapes {list(old)} to {list(new)} after joining tensors")
    outputs = []
    for part in x.parts:
        kept = iter(bounds for bounds, size in zip(part.region, old, strict=True) if size != 1)
        region = tuple((0, 1) if size == 1 else next(kept) for size in new)
        shape = tuple(stop - start for start, stop in region)
        outputs.append(Part(part.stored, (*part.views, ("reshape", *shape)), region))
    return [outputs]


def _swap(parts: Sequence[Part], dim0: int, dim1: int) -> list[Part]:
    if dim0 == dim1:
        return list(parts)
    swapped = []
    for part in parts:
        region = list(part.region)
        region[dim0], region[dim1] = region[dim1], region[dim0]
        swapped.append(Part(part.stored, (*part.views, ("transpose", dim0, dim1)), tuple(region)))
    return swapped


def _transpose(result: torch.Tensor, x: TracedTensor, dim0: int = 0, dim1: int = 1) -> _Outputs:
    return [_swap(x.parts, dim0 % max(x.ndim, 1), dim1 % max(x.ndim, 1))] if x.ndim > 1 else [list(x.parts)]


def _permute(result: torch.Tensor, x: TracedTensor, dims: Sequence[int]) -> _Outputs:
    parts, order = list(x.parts), list(range(x.ndim))
    for place, dim in enumerate(dim % x.ndim for dim in dims):
        other = order.index(dim)
        parts = _swap(parts, place, other)
        order[place], order[other] = order[other], order[place]
    return [parts]


def _cut(parts: Sequence[Part], dim: int, start: int, stop: int) -> list[Part]:
    """The parts of `x[start:stop]` along `dim`."""
    kept = []
    for part in parts:
        low, high = part.region[dim]
        first, last = max(low, start), min(high, stop)
        if first >= last:
            continue
        views = part.views if (first, last) == (low, high) else (*part.views, ("slice", dim, first - low, last - low))
        region = (*part.region[:dim], (first - start, last - start), *part.region[dim + 1 :])
        kept.append(Part(part.stored, views, region))
    return kept


def _drop(parts: Sequence[Part], dim: int) -> list[Part]:
    """The parts without dimension `dim`, which has one element."""
    dropped = []
    for part in parts:
        region = (*part.region[:dim], *part.region[dim + 1 :])
        shape = tuple(stop - start for start, stop in region)
        dropped.append(Part(part.stored, (*part.views, ("reshape", *shape)), region))
    return dropped


def _slice(
    result: torch.Tensor,
    x: TracedTensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> _Outputs:
    if step != 1:
        raise UntraceableError(f"it takes every {step}th element")
    dim, size = dim % x.ndim, x.shape[dim]
    first, last, _ = slice(start, end).indices(size)
    return [_cut(x.parts, dim, first, last)]


def _select(result: torch.Tensor, x: TracedTensor, dim: int, index: int) -> _Outputs:
    dim = dim % x.ndim
    index = index % x.shape[dim]
    return [_drop(_cut(x.parts, dim, index, index + 1), dim)]


def _split(result: Sequence[torch.Tensor], x: TracedTensor, sizes: Any, dim: int = 0) -> _Outputs:
    dim, start, outputs = dim % x.ndim, 0, []
    for one in result:
        outputs.append(_cut(x.parts, dim, start, start + one.shape[dim]))
        start += one.shape[dim]
    return outputs


def _unbind(result: Sequence[torch.Tensor], x: TracedTensor, dim: int = 0) -> _Outputs:
    return [_select(one, x, dim, index)[0] for index, one in enumerate(result)]


def _cat(result: torch.Tensor, tensors: Sequence[TracedTensor], dim: int = 0) -> _Outputs:
    dim, start, joined = dim % result.ndim, 0, []
    for x in tensors:
        for part in x.parts:
            low, high = part.region[dim]
            region = (*part.region[:dim], (low + start, high + start), *part.region[dim + 1 :])
            joined.append(replace(part, region=region))
        start += x.shape[dim]
    return [joined]


def _stack(result: torch.Tensor, tensors: Sequence[TracedTensor], dim: int = 0) -> _Outputs:
    dim, stacked = dim % result.ndim, []
    for index, x in enumerate(tensors):
        for part in x.parts:
            region = (*part.region[:dim], (index, index + 1), *part.region[dim:])
            shape = (*part.shape[:dim], 1, *part.shape[dim:])
            stacked.append(Part(part.stored, (*part.views, ("reshape", *shape)), region))
    return [stacked]


_RULES: dict[str, Callable[..., _Outputs]] = {
    **dict.fromkeys(("alias", "clone", "contiguous", "detach", "_to_copy"), _same),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze"), _reshape),
    **dict.fromkeys(("transpose", "t"), _transpose),
    **dict.fromkeys(("split", "split_with_sizes"), _split),
    "permute": _permute,
    "slice": _slice,
    "select": _select,
    "unbind": _unbind,
    "cat": _cat,
    "stack": _stack,
}

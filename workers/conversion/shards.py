"""Which tensors the files of a new checkpoint hold, and where: known before the first of them is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexgen_lite.model.formats.compressed_tensors import SCALES, SHAPE, VALUES, ZEROS
from flexgen_lite.model.packing import Packing
from flexgen_lite.model.spec import ITEM_BYTES
from flexgen_lite.model.stored_tensor import StoredTensor

ALIGN = 8
_DTYPES = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8",
    "bool": "BOOL",
}  # fmt: skip
DIGEST = "flexgen_lite"
"""Of a file's metadata: tells what it was made of, and how."""


@dataclass(frozen=True, slots=True)
class NewTensor:
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Item:
    """A tensor of the source, and how it is to be packed; None: it is copied."""

    source: StoredTensor
    packing: Packing | None

    @property
    def layer(self) -> str:
        return self.source.name.removesuffix(".weight")

    @property
    def new_tensors(self) -> tuple[NewTensor, ...]:
        source, packing = self.source, self.packing
        if packing is None:
            return (NewTensor(source.name, source.dtype, source.shape),)
        (columns, width), groups, items = source.shape, source.shape[1] // packing.group, 32 // packing.bits
        found = [
            NewTensor(self.layer + SHAPE, "int64", (2,)),
            NewTensor(self.layer + VALUES, "int32", (columns, width // items)),
        ]
        if packing.has_zeros:
            found.append(NewTensor(self.layer + ZEROS, "int32", (-(-columns // items), groups)))
        return (*found, NewTensor(self.layer + SCALES, packing.scale_dtype, (columns, groups)))


@dataclass(frozen=True, slots=True)
class Shard:
    """A file: its header, then the tensors, each at `offsets[name]` from its start."""

    name: str
    items: tuple[Item, ...]
    header: bytes
    offsets: dict[str, int]
    num_bytes: int


def plan_shards(items: Iterable[Item], digest: str, max_bytes: int) -> list[Shard]:
    """Files for `items`, in their order, of at most `max_bytes` each, but where one item takes more."""
    runs: list[list[Item]] = [[]]
    size = 0
    for item in items:
        num_bytes = sum(tensor.num_bytes for tensor in item.new_tensors)
        if runs[-1] and size + num_bytes > max_bytes:
            runs.append([])
            size = 0
        runs[-1].append(item)
        size += num_bytes
    return [
        _shard(f"model-{number:05}-of-{len(runs):05}.safetensors", run, digest)
        for number, run in enumerate(runs, start=1)
    ]


def _shard(name: str, items: Sequence[Item], digest: str) -> Shard:
    tensors = [tensor for item in items for tensor in item.new_tensors]
    # Without gaps, and yet each where its items may lie: what would move the others comes last.
    tensors.sort(key=lambda t: -ITEM_BYTES[t.dtype] if t.num_bytes % ALIGN else -math.inf)
    header: dict[str, object] = {"__metadata__": {"format": "pt", DIGEST: digest}}
    starts, end = {}, 0
    for tensor in tensors:
        starts[tensor.name] = end
        offsets = [end, end + tensor.num_bytes]
        header[tensor.name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        end += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGN)
    data = len(text).to_bytes(8, "little") + text
    return Shard(name, tuple(items), data, {k: len(data) + start for k, start in starts.items()}, len(data) + end)


def index_of(shards: Sequence[Shard]) -> dict[str, object]:
    """What the checkpoint's index says."""
    total = sum(shard.num_bytes - len(shard.header) for shard in shards)
    weight_map = {name: shard.name for shard in shards for name in shard.offsets}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}

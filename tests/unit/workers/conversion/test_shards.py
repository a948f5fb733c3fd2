"""The files of a new checkpoint, planned before they are written."""

from __future__ import annotations

import json
import math
import random

from flexgen_lite.model.packing import Packing
from flexgen_lite.model.spec import ITEM_BYTES
from flexgen_lite.model.stored_tensor import StoredTensor
from flexgen_lite.workers.conversion.shards import DIGEST, Item, index_of, plan_shards


def item(number: int, shape: tuple[int, ...], packing: Packing | None, dtype: str = "bfloat16") -> Item:
    size = math.prod(shape) * ITEM_BYTES[dtype]
    return Item(StoredTensor(f"layer.{number}.weight", 0, 0, size, dtype, shape), packing)


def test_whole_and_each_where_its_items_may_lie() -> None:
    rng = random.Random(0)
    packings = [None, Packing(4, 32, "bfloat16", "bfloat16", "uint8"), Packing(8, 16, "bfloat16", "bfloat16")]
    items = [
        item(number, (rng.randrange(1, 40), 32 * rng.randrange(1, 5)), rng.choice(packings)) for number in range(200)
    ]
    items += [item(200 + n, (n,), None, rng.choice(["uint8", "float32", "bfloat16"])) for n in range(1, 20)]
    rng.shuffle(items)
    shards = plan_shards(items, "digest", 20_000)
    assert len(shards) > 3 and [i for shard in shards for i in shard.items] == items
    names = {tensor.name for i in items for tensor in i.new_tensors}
    assert set(index_of(shards)["weight_map"]) == names  # type: ignore[call-overload]
    for shard in shards:
        length = int.from_bytes(shard.header[:8], "little")
        header = json.loads(shard.header[8:])
        assert len(shard.header) == 8 + length and length % 8 == 0
        assert header.pop("__metadata__") == {"format": "pt", DIGEST: "digest"}
        end = 0
        for tensor in sorted((t for i in shard.items for t in i.new_tensors), key=lambda t: shard.offsets[t.name]):
            assert header[tensor.name]["data_offsets"] == [end, end + tensor.num_bytes]
            assert shard.offsets[tensor.name] == len(shard.header) + end
            assert shard.offsets[tensor.name] % ITEM_BYTES[tensor.dtype] == 0
            end += tensor.num_bytes
        assert shard.num_bytes == len(shard.header) + end
        assert end <= 20_000 or len(shard.items) == 1


def test_parts_of_a_weight() -> None:
    found = item(0, (20, 64), Packing(4, 32, "bfloat16", "bfloat16", "uint8")).new_tensors
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in found} == {
        "layer.0.weight_shape": ("int64", (2,)),
        "layer.0.weight_packed": ("int32", (20, 8)),
        "layer.0.weight_zero_point": ("int32", (3, 2)),
        "layer.0.weight_scale": ("bfloat16", (20, 2)),
    }

"""Products with weights whose inputs are sorted by group: rows are gathered in their order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from flexgen_lite.model.packing import Packing
from flexgen_lite.workers.compute import experts
from flexgen_lite.workers.compute.products import Products
from flexgen_lite.workers.compute.unpacked_weights import PackedBits, multiplied, unpacked
from flexgen_lite.workers.model.weight_map import packed_weights
from tests.packed_weights import packed

COLUMNS, WIDTH, GROUP, COUNT = 80, 128, 32, 3
SORTED = Packing(4, GROUP, "bfloat16", "bfloat16", "uint8", is_sorted=True)


def made(packing: Packing, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed bytes, and the weights with their inputs in the order that the model has them in, `[E, N, K]`."""
    generator = torch.Generator().manual_seed(0)
    q_ENK = torch.randint(-8, 8, (count, COLUMNS, WIDTH), generator=generator)
    scale_ENG = torch.rand((count, COLUMNS, WIDTH // GROUP), generator=generator).bfloat16().float()
    zero_ENG = torch.randint(-8, 8, scale_ENG.shape, generator=generator)
    order_EK = torch.stack([torch.randperm(WIDTH, generator=generator) for _ in range(count)])
    memory = torch.cat([packed(q_ENK, scale_ENG, zero_ENG, packing), order_EK.int().reshape(-1).view(torch.uint8)])
    assert memory.numel() == packing.num_bytes((count, COLUMNS, WIDTH))
    spread = [items.repeat_interleave(GROUP, 2) for items in (zero_ENG, scale_ENG)]
    weights_ENK = torch.empty(count, COLUMNS, WIDTH)
    weights_ENK.scatter_(2, order_EK[:, None].expand(-1, COLUMNS, -1), (q_ENK - spread[0]).float() * spread[1])
    return memory, weights_ENK


@pytest.mark.parametrize("order", ["bfloat16", "int8"])
def test_unpacking(order: str) -> None:
    packing = replace(SORTED, order=order)
    memory, weights_ENK = made(packing, COUNT)
    shape = (COUNT, COLUMNS, WIDTH)
    for index in range(COUNT):
        assert torch.equal(unpacked(memory, packing, shape, index, torch.float32), weights_ENK[index])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_linear_layer(dtype: torch.dtype) -> None:
    packing = replace(SORTED, order="bfloat16" if dtype == torch.bfloat16 else "int8")
    memory, weights_ENK = made(packing, 1)
    model = nn.Sequential(nn.Linear(WIDTH, COLUMNS, dtype=dtype))
    Products(model, dtype, torch.device("cpu"), packings={"0.weight": packing})
    packed_weights(model[0])["weight"] = memory
    x_TK = torch.randn(5, WIDTH, dtype=dtype)
    expected = linear(x_TK.double(), weights_ENK[0].to(dtype).double(), model[0].bias.double())
    assert torch.allclose(model(x_TK).double(), expected, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts(dtype: torch.dtype) -> None:
    """Each has an order of its own."""
    packing = replace(SORTED, order="bfloat16" if dtype == torch.bfloat16 else "int8")
    memory, weights_ENK = made(packing, COUNT)
    module = nn.Module()
    packed_weights(module)["up_proj"] = memory
    bits = PackedBits(module, "up_proj", packing, (COUNT, COLUMNS, WIDTH), dtype)
    x_TK, numbers, counts = torch.randn(4, WIDTH, dtype=dtype), torch.tensor([3, 0, 1, 3, 2]), [(0, 2), (2, 3)]
    rows = experts._in_order(experts._Rows(x_TK, numbers, counts), bits)
    found, begin = [], 0
    for expert, count in counts:
        found.append(multiplied(linear, rows.x[begin : begin + count], bits, expert, None))
        begin += count
    which = [0, 0, 2, 2, 2]
    expected = torch.stack(
        [x_TK[n].double() @ weights_ENK[e].to(dtype).double().t() for n, e in zip(numbers, which, strict=True)]
    )
    assert rows.numbers is None
    assert torch.allclose(torch.cat(found).double(), expected, rtol=2**-7, atol=2**-5)

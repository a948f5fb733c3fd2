"""Linear layers through oneDNN give what torch gives, with weights packed in place or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from flexgen_lite.workers.compute import product_onednn, products
from flexgen_lite.workers.compute.products import Products

CPU = torch.device("cpu")
DTYPES = [
    pytest.param(dtype, marks=pytest.mark.skipif(not products._works(dtype), reason="not on this processor"))
    for dtype in (torch.float32, torch.bfloat16)
]


class Model(nn.Module):
    """A layer, and a head whose weight is the embedding's."""

    def __init__(self, width: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(64, width, dtype=dtype)
        self.head = nn.Linear(width, 64, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight
        self.layer = nn.ModuleDict(
            {"up": nn.Linear(width, outputs, dtype=dtype), "conv": Conv1D(outputs, width).to(dtype)}
        )
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.requires_grad_(False)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1,), (7,), (1, 70), (2, 3)])
def test_same_results_before_and_after_packing(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    model = Model(128, 64, dtype)
    x = torch.randn((*rows, 128)).to(dtype)
    up, conv = model.layer["up"], model.layer["conv"]
    expected = linear(x, up.weight, up.bias), conv(x), linear(x, model.head.weight)
    made = Products(model, dtype, CPU)
    assert close(up(x), expected[0])
    memory = up.weight.data
    before = memory.clone()
    made.pack(model.modules())
    assert close(up(x), expected[0]) and close(conv(x), expected[1]) and close(model.head(x), expected[2])
    assert not torch.equal(memory, before), "the weight was packed where it lies"
    memory.zero_()
    assert close(up(x), up.bias.expand_as(expected[0])), "the product reads that memory"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_weight_cannot_be_read_by_mistake(dtype: torch.dtype) -> None:
    model = Model(128, 64, dtype)
    Products(model, dtype, CPU).pack(model.modules())
    weight = model.layer["up"].weight
    assert weight.is_meta and weight.shape == (64, 128) and weight.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_with_two_readers_stays(dtype: torch.dtype) -> None:
    model = Model(128, 64, dtype)
    before = model.embedding.weight.clone()
    Products(model, dtype, CPU).pack(model.modules())
    assert torch.equal(model.embedding.weight, before) and model.head.weight is model.embedding.weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [1, 33, 65])
def test_sizes_that_would_need_padding(dtype: torch.dtype, outputs: int) -> None:
    model = Model(48, outputs, dtype)
    x = torch.randn((5, 48)).to(dtype)
    up = model.layer["up"]
    expected = linear(x, up.weight, up.bias)
    Products(model, dtype, CPU).pack(model.modules())
    assert close(up(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: torch.dtype) -> None:
    model = Model(128, 64, dtype)
    Products(model, dtype, CPU).pack(model.modules())
    assert model.layer["up"](torch.empty((1, 0, 128), dtype=dtype)).shape == (1, 0, 64)


def test_other_dtypes_and_devices_keep_their_own_forward() -> None:
    for dtype, device in ((torch.float16, CPU), (torch.float32, torch.device("cuda"))):
        model = Model(128, 64, dtype)
        Products(model, dtype, device).pack(model.modules())
        assert "forward" not in vars(model.layer["up"]) and not model.layer["up"].weight.is_meta


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_of_the_head_where_there_is_room(dtype: torch.dtype) -> None:
    model = Model(128, 64, dtype)
    made = Products(model, dtype, CPU)
    before, x = model.embedding.weight.clone(), torch.randn((3, 128)).to(dtype)
    expected = linear(x, model.head.weight)
    assert made.copied_bytes(model.modules()) == 64 * 128 * dtype.itemsize
    made.pack(model.modules(), copy_shared=True)
    assert torch.equal(model.embedding.weight, before) and close(model.head(x), expected)
    model.embedding.weight.zero_()
    assert close(model.head(x), expected), "the product reads the copy"


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_wanted_rows_are_computed(dtype: torch.dtype) -> None:
    model = Model(128, 64, dtype)
    made = Products(model, dtype, CPU)
    x = torch.randn((1, 5, 128)).to(dtype)
    up = model.layer["up"]
    expected = linear(x, up.weight, up.bias)
    with made.only(torch.tensor([1, 4]), 5):
        some, other = up(x), up(x[:, :3])
    assert some.shape == expected.shape and close(some[0, [1, 4]], expected[0, [1, 4]])
    assert not some[0, [0, 2, 3]].any(), "rows that nobody reads are not computed"
    assert close(other, expected[:, :3]), "a product of other rows is computed whole"
    with made.only(torch.tensor([], dtype=torch.long), 5):
        assert not up(x).any()
    assert close(up(x), expected)


def test_products_have_one_of_few_numbers_of_rows() -> None:
    sizes = [product_onednn.rows_of_product(count) for count in range(1, 2049)]
    assert len(set(sizes)) <= 60
    assert all(0 <= size - count < max(8, count // 4) for count, size in enumerate(sizes, start=1))
    wasted = sum(sizes[64:]) / sum(range(65, 2049))
    assert wasted < 1.04


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_fill_up_change_nothing(dtype: torch.dtype) -> None:
    model = Model(128, 64, dtype)
    Products(model, dtype, CPU).pack(model.modules())
    x = torch.randn((2, 130, 128)).to(dtype)
    together = model.layer["up"](x)
    assert together.shape == (2, 130, 64) and together.is_contiguous()
    alone = torch.stack([model.layer["up"](part) for part in x])
    assert close(together, alone)

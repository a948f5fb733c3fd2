"""What prompts see of their own keys and values where the KV cache is in int8."""

from __future__ import annotations

import pytest
import torch

from flexgen_lite.workers.compute import int8_row_kernel, int8_rows
from tests.int8_cache import rounded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dim", "order"), [(256, 256), (128, 128), (64, 64), (576, 64), (80, 16), (24, 8), (20, 4), (9, 1), (6, 2), (1, 1)]
)
def test_rows_are_those_of_the_cache(dim: int, order: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    rows_1GTD = torch.randn(1, 150, 3, dim).mul_(torch.rand(dim) * 9).to(dtype).transpose(1, 2)
    rows_1GTD[0, 1, 5] = 0
    expected = rounded(rows_1GTD.float(), order).to(dtype)
    kept = int8_rows.rounded(rows_1GTD, order)
    assert kept.shape == rows_1GTD.shape and kept.dtype == dtype
    if int8_row_kernel.serves(rows_1GTD):
        assert torch.equal(kept, expected)
    else:  # sums in another order: an item half way between two may go to either
        wide, reference = kept.float(), rows_1GTD.float()
        assert (wide - expected.float()).abs().max() < reference.abs().max() / 50
        assert (wide - reference).norm() < 1.01 * (expected.float() - reference).norm() + 1e-6


def test_a_row_that_is_not_finite_becomes_nan_and_no_other() -> None:
    rows = torch.randn(1, 2, 70, 40)
    rows[0, 0, 3, 7], rows[0, 1, 69, 39] = float("inf"), float("nan")
    flawed = ~rows.isfinite().all(-1)
    kept = int8_rows.rounded(rows, 8)
    assert kept[flawed].isnan().all() and kept[~flawed].isfinite().all()


def test_items_that_are_alike_lose_no_more_than_they_would_as_they_are() -> None:
    torch.manual_seed(0)
    rows = 1 + torch.randn(1, 1, 200, 256) / 10
    errors = [(int8_rows.rounded(rows, order) - rows).square().mean() for order in (1, 256)]
    assert errors[1] < 1.2 * errors[0]


def test_one_large_item_costs_the_others_little() -> None:
    torch.manual_seed(0)
    rows = torch.randn(1, 1, 200, 128)
    rows[..., 5] = 40
    errors = [(int8_rows.rounded(rows, order) - rows)[..., 6:].square().mean().sqrt() for order in (1, 128)]
    assert errors[1] < errors[0] / 4

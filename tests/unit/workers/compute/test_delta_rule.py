"""Our kernel for single tokens of gated delta nets gives what Transformers' function gives, and leaves old states."""

from __future__ import annotations

import pytest
import torch
from transformers.models.olmo_hybrid import modeling_olmo_hybrid
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

from flexgen_lite.workers.compute import delta_rule, prefill_cpu
from flexgen_lite.workers.compute.delta_rule import DeltaRule, StateInPlace, marked

pytestmark = pytest.mark.skipif(prefill_cpu.parallel() is None, reason="PyTorch's threads are not GNU's")
NAME = delta_rule.NAMES[0]
MODULES = (modeling_qwen3_next, modeling_qwen3_5, modeling_olmo_hybrid)


def original(module: object) -> object:
    function = getattr(module, NAME)
    return function._unfused if isinstance(function, DeltaRule) else function


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (24, 48), (128, 128), (96, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_the_classes_function(module: object, key_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    function = original(module)
    ours = DeltaRule(function)
    draws = torch.Generator().manual_seed(key_dim)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draws)

    count, key_heads, heads = 5, 2, 6
    places = drawn(2 * count, heads, key_dim, value_dim)
    before = places.clone()
    sources, targets = [8, 1, 4, 7, 2], [9, 0, 5, 6, 3]
    arguments = [drawn(count, 1, n, dim).to(dtype) for n, dim in ((key_heads, key_dim),) * 2 + ((heads, value_dim),)]
    options = {"g": -drawn(count, 1, heads).abs(), "beta": drawn(count, 1, heads).sigmoid().to(dtype)}
    expected, new = function(  # type: ignore[operator]
        *arguments, initial_state=places[sources], output_final_state=True, use_qk_l2norm_in_kernel=True, **options
    )
    addresses = [torch.tensor([places[i].data_ptr() for i in numbers]) for numbers in (sources, targets)]
    state = marked((count, heads, key_dim, value_dim), StateInPlace(*addresses))
    found, same = ours(
        *arguments, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True, **options
    )
    assert same is state and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)
    torch.testing.assert_close(places[targets], new.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(places[sources], before[sources])


def test_states_that_are_tensors_go_to_the_classes_function() -> None:
    calls = []
    ours = DeltaRule(lambda *args, **kwargs: calls.append((args, kwargs)))
    rows = torch.zeros(1, 3, 2, 16)
    ours(rows, rows, rows, g=rows[..., 0], beta=rows[..., 0], initial_state=torch.zeros(1, 2, 16, 16), cu_seqlens=None)
    ((args, kwargs),) = calls
    assert len(args) == 3 and kwargs["initial_state"].shape == (1, 2, 16, 16) and "cu_seqlens" in kwargs


@pytest.mark.parametrize("module", MODULES)
def test_a_function_that_gives_something_else_is_left(module: object) -> None:
    function = original(module)

    def other(*args: torch.Tensor, **kwargs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, state = function(*args, **kwargs)  # type: ignore[operator]
        return output * 1.01, state

    assert delta_rule._gives_the_same(function, DeltaRule(function))  # type: ignore[arg-type]
    assert not delta_rule._gives_the_same(other, DeltaRule(other))

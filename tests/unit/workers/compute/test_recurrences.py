"""Our kernels for recurrences give what the functions of Transformers' classes give, and leave old states alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.bailing_hybrid import modeling_bailing_hybrid
from transformers.models.bamba import modeling_bamba
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.nemotron_h import modeling_nemotron_h
from transformers.models.olmo_hybrid import modeling_olmo_hybrid
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_next import modeling_qwen3_next

from flexgen_lite.workers.compute import prefill_cpu
from flexgen_lite.workers.compute.recurrences import (
    SEVERAL,
    SINGLE,
    DeltaRule,
    MambaStep,
    Recurrence,
    StateInPlace,
    marked,
)

pytestmark = pytest.mark.skipif(prefill_cpu.parallel() is None, reason="PyTorch's threads are not GNU's")
DELTA = (modeling_qwen3_next, modeling_qwen3_5, modeling_olmo_hybrid)
KIMI = (modeling_kimi_linear, modeling_bailing_hybrid)
MAMBA = (modeling_granitemoehybrid, modeling_nemotron_h, modeling_bamba, modeling_mamba2)
DELTA_STEP, _, MAMBA_STEP = SINGLE


def original(module: Any, name: str) -> Any:
    function = getattr(module, name)
    return function.unfused if isinstance(function, Recurrence) else function


class Drawn:
    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)


@pytest.mark.parametrize("module", [*DELTA, *KIMI, *MAMBA])
def test_each_function_is_proved(module: Any) -> None:
    kinds = {name: kind for name, kind in {**SINGLE, **SEVERAL}.items() if hasattr(module, name)}
    assert len(kinds) == 2
    for name, kind in kinds.items():
        function = original(module, name)
        assert kind(function).try_out()

        def other(*args: Any, function: Any = function, **kwargs: Any) -> Any:
            found = function(*args, **kwargs)
            return (found[0] * 1.01, *found[1:]) if isinstance(found, tuple) else found * 1.01

        assert not kind(other).try_out()


def in_place(places: torch.Tensor, sources: list[int], targets: list[int]) -> torch.Tensor:
    addresses = [torch.tensor([places[i].data_ptr() for i in numbers]) for numbers in (sources, targets)]
    return marked((len(sources), *places.shape[1:]), StateInPlace(*addresses))


SOURCES, TARGETS = [8, 1, 4, 7, 2], [9, 0, 5, 6, 3]


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (24, 48), (128, 128), (96, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_of_the_delta_rule(rows: int, columns: int, dtype: torch.dtype) -> None:
    function, drawn = original(modeling_qwen3_5, DELTA_STEP), Drawn(rows)
    count, key_heads, heads = 5, 2, 6
    places = drawn(2 * count, heads, rows, columns)
    before = places.clone()
    arguments = [drawn(count, 1, n, size).to(dtype) for n, size in ((key_heads, rows),) * 2 + ((heads, columns),)]
    options = {
        "g": -drawn(count, 1, heads).abs(), "beta": drawn(count, 1, heads).sigmoid().to(dtype),
        "output_final_state": True, "use_qk_l2norm_in_kernel": True,
    }  # fmt: skip
    expected, new = function(*arguments, initial_state=places[SOURCES], **options)
    state = in_place(places, SOURCES, TARGETS)
    found, same = DeltaRule(function)(*arguments, initial_state=state, **options)
    assert same is state and found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)
    torch.testing.assert_close(places[TARGETS], new.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(places[SOURCES], before[SOURCES])


@pytest.mark.parametrize(("rows", "columns", "groups"), [(16, 16, 1), (5, 48, 3), (64, 128, 1)])
def test_one_token_of_mamba(rows: int, columns: int, groups: int) -> None:
    function, drawn = original(modeling_mamba2, MAMBA_STEP), Drawn(rows)
    count, heads = 5, 6
    places = drawn(2 * count, heads, rows, columns)
    before = places.clone()
    arguments = (
        drawn(count, heads, rows), drawn(count, heads)[..., None].expand(-1, -1, rows),
        (-drawn(heads).abs())[:, None, None].expand(-1, rows, columns), drawn(count, groups, columns),
        drawn(count, groups, columns), drawn(heads)[:, None].expand(-1, rows),
    )  # fmt: skip
    options = {"z": None, "dt_bias": drawn(heads)[:, None].expand(-1, rows), "dt_softplus": True}
    states = places[SOURCES]
    expected = function(states, *arguments, **options)
    found = MambaStep(function)(in_place(places, SOURCES, TARGETS), *arguments, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(places[TARGETS], states, rtol=1e-4, atol=1e-5)
    assert torch.equal(places[SOURCES], before[SOURCES])


def test_what_the_kernels_do_not_serve_goes_to_the_function() -> None:
    calls: list[Any] = []
    ours = DeltaRule(lambda *args, **kwargs: calls.append((args, kwargs)))
    rows = torch.zeros(1, 3, 2, 17)
    ours(rows, rows, rows, g=rows[..., 0], beta=rows[..., 0], initial_state=torch.zeros(1, 2, 17, 17), cu_seqlens=None)
    ((args, kwargs),) = calls
    assert len(args) == 3 and kwargs["initial_state"].shape == (1, 2, 17, 17) and "cu_seqlens" in kwargs

"""Experts' forward of ours: what each expert alone gives of its rows, for every kind that Transformers has."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, NemotronHConfig, OlmoeConfig
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from flexgen_lite.workers.compute import experts
from flexgen_lite.workers.compute.products import Products
from flexgen_lite.workers.model.builder import EXPERTS_NAME

DTYPES = (torch.float32, torch.bfloat16)
NUM_EXPERTS, TOP_K = 6, 2


@pytest.fixture(autouse=True)
def _registered() -> None:
    experts.register()


def made(kind: str, hidden: int = 64, inner: int = 96) -> Any:
    """Experts with random weights, in float64."""
    if kind == "gate":
        config: Any = OlmoeConfig(hidden_size=hidden, intermediate_size=inner, num_experts=NUM_EXPERTS)
        module: nn.Module = OlmoeExperts(config)
    elif kind == "turned, bias":
        config = GptOssConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=NUM_EXPERTS)
        module = GptOssExperts(config)
    else:
        config = NemotronHConfig(hidden_size=hidden, moe_intermediate_size=inner, n_routed_experts=NUM_EXPERTS)
        module = NemotronHExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
    return module.requires_grad_(False)


def routed(tokens: int, hidden: int = 64, used: int = NUM_EXPERTS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    chosen = torch.empty((tokens, TOP_K), dtype=torch.int64)
    for token in range(tokens):
        chosen[token] = torch.randperm(used, generator=generator)[:TOP_K]
    share = torch.rand((tokens, TOP_K), generator=generator, dtype=torch.float64)
    return torch.randn((tokens, hidden), generator=generator, dtype=torch.float64), chosen, share


def expected(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """By the class's own forward, in float64, of the same numbers."""
    module = copy.deepcopy(module).double()
    module.config._experts_implementation = "eager"
    output: torch.Tensor = module(hidden.double(), chosen, share.double())
    return output


def close(output: torch.Tensor, wanted: torch.Tensor) -> bool:
    tolerance = 2e-2 if output.dtype == torch.bfloat16 else 1e-5
    if not output.numel():
        return output.shape == wanted.shape
    return bool((output.double() - wanted).abs().max() <= tolerance * wanted.abs().max())


@pytest.mark.parametrize("prepared", ["as they lie", "by products", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["gate", "turned, bias", "no gate"])
def test_against_the_class_itself(kind: str, dtype: torch.dtype, prepared: str) -> None:
    module = made(kind).to(dtype)
    kept = copy.deepcopy(module)
    module.config._experts_implementation = EXPERTS_NAME
    if prepared != "as they lie":
        products = Products(module, dtype, torch.device("cpu"))
        if prepared == "packed":
            products.pack(module.modules())
    for tokens in (0, 1, 5, 300):
        hidden, chosen, share = routed(tokens)
        hidden, share = hidden.to(dtype), share.to(dtype)
        output = module(hidden, chosen, share)
        assert output.dtype == dtype and close(output, expected(kept, hidden, chosen, share))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_again_by_the_next_process(dtype: torch.dtype) -> None:
    for kind in ("gate", "turned, bias"):
        module = made(kind, inner=128).to(dtype)
        kept, views = copy.deepcopy(module), copy.copy(module)
        views._parameters = dict(module._parameters)
        Products(module, dtype, torch.device("cpu")).pack(module.modules())
        views.config._experts_implementation = EXPERTS_NAME
        Products(views, dtype, torch.device("cpu")).pack(views.modules(), in_order=True)
        hidden, chosen, share = routed(9)
        output = views(hidden.to(dtype), chosen, share.to(dtype))
        assert close(output, expected(kept, hidden.to(dtype), chosen, share.to(dtype)))


def test_more_rows_than_a_group_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "GROUP_ROWS", 16)
    module = made("gate").float()
    hidden, chosen, share = routed(70, used=4)  # two experts have no rows
    wanted = expected(module, hidden.float(), chosen, share.float())
    module.config._experts_implementation = EXPERTS_NAME
    assert close(module(hidden.float(), chosen, share.float()), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_others(dtype: torch.dtype) -> None:
    module = made("gate", inner=128).to(dtype)
    module.config._experts_implementation = EXPERTS_NAME
    Products(module, dtype, torch.device("cpu")).pack(module.modules())
    hidden, chosen, share = routed(40)
    together = module(hidden.to(dtype), chosen, share.to(dtype))
    for token in (0, 17, 39):
        part = slice(token, token + 1)
        alone = module(hidden[part].to(dtype), chosen[part], share[part].to(dtype))
        if dtype == torch.bfloat16:
            assert torch.equal(alone, together[part])
        else:  # oneDNN's order of a sum depends on the number of rows
            assert torch.allclose(alone, together[part], rtol=1e-5, atol=1e-5)


def test_rows_of_no_expert_give_nothing() -> None:
    module = made("gate").float()
    module.config._experts_implementation = EXPERTS_NAME
    hidden, chosen, share = routed(5)
    chosen[3] = NUM_EXPERTS
    output = module(hidden.float(), chosen, share.float())
    assert not output[3].any() and bool(output[[0, 1, 2, 4]].any(1).all())


def test_a_norm_behind_each_expert() -> None:
    @use_experts_implementation(has_post_expert_norm=True)
    class Experts(OlmoeExperts):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.post_expert_norm = nn.RMSNorm(config.hidden_size)

    config = OlmoeConfig(hidden_size=64, intermediate_size=96, num_experts=NUM_EXPERTS)
    module: Any = Experts(config)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.1
    module.requires_grad_(False)
    hidden, chosen, share = (x.float() if x.is_floating_point() else x for x in routed(7))
    config._experts_implementation = "batched_mm"
    wanted = module(hidden, chosen, share)
    config._experts_implementation = EXPERTS_NAME
    assert close(module(hidden, chosen, share), wanted.double())

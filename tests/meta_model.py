"""A causal LM with its parameters on the meta device and its non-persistent buffers real, for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", register_on_meta), no_init_weights():
        yield


def build_on_meta(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    with _parameters_on_meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model.eval()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of as many modules as the config has layers."""
    count = model.config.get_text_config().num_hidden_layers
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return found[0]

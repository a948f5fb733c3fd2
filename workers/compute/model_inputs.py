"""What a model's forward is given for a micro-batch of packed tokens.

Shapes: T tokens.
"""

from __future__ import annotations

import inspect
import sys
from functools import cache
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from flexgen_lite.workers.model.builder import decoder_of


def model_inputs(model: PreTrainedModel, token_ids_1T: torch.Tensor, positions_1T: torch.Tensor) -> dict[str, Any]:
    """For a forward over tokens at these positions of their sequences."""
    inputs: dict[str, Any] = {"input_ids": token_ids_1T, "position_ids": positions_1T, "use_cache": False}
    if _asks_for_length(type(decoder_of(model)).__module__):
        parameters = inspect.signature(model.forward).parameters
        inputs["cache" if "cache" in parameters else "past_key_values"] = _Offsets(positions_1T[0])
    return inputs


class _Offsets(Cache):
    """Stands for the cache where attention reckons a token's position from its row and the cache's length (Llama 4):
    tells a length for each row."""

    def __init__(self, positions_T: torch.Tensor) -> None:
        super().__init__(layers=[])
        self._offsets_T = positions_T - torch.arange(len(positions_T), device=positions_T.device)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return self._offsets_T

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states


@cache
def _asks_for_length(module: str) -> bool:
    return "get_seq_length(self.layer_idx)" in inspect.getsource(sys.modules[module])

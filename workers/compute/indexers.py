"""Sparse attention whose indexer chooses the tokens that each token sees: as many as there are, up to a limit.

Up to that limit such attention is dense attention, and what the indexer would choose is not computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

ALL = torch.zeros((1, 1, 0), dtype=torch.int32)
"""What an indexer chooses here."""
NO_MASK = torch.zeros((1, 1, 1, 1), dtype=torch.bool)
"""In the place of the mask that is given to an indexer."""


def choose_all(modules: Iterable[nn.Module]) -> bool:
    """Has the modules with an indexer see everything; whether there are any."""
    found = False
    for module in modules:
        indexer = getattr(module, "indexer", None)
        if isinstance(indexer, nn.Module):
            vars(indexer)["forward"] = lambda *_, **__: ALL
            module.register_forward_pre_hook(_without_mask, with_kwargs=True)
            found = True
    return found


def _without_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"attention_mask": NO_MASK}

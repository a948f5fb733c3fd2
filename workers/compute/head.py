"""From the layers' output to logits, some rows at a time: all rows at once may be larger than everything else.

The model's own forward does it, so that scales, softcaps and biases are its own: the output of what it calls first, the
stack of layers, is caught on the way through, and the forward is called again for other rows with that output in the
stack's place.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flexgen_lite.wire.sampling import LOGITS_BYTES
from flexgen_lite.workers.serve import UserError

_WANTED_N: ContextVar[torch.Tensor] = ContextVar("rows_N")
"""Of which logits are wanted, in each greenlet: what its head selects where the model's forward does not."""


class Head:
    """Args:
    model: whose forward it is.
    layers: its decoder layers.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module]) -> None:
        self._model = model
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._caught: tuple[nn.Module, Any] | None = None  # of the forward that ended last
        if not self._keeps_rows:
            head = model.get_output_embeddings()
            if head is None:
                raise UserError(
                    f"{type(model).__name__} gives the logits of all tokens at once, which is not supported"
                )
            head.register_forward_pre_hook(self._select)
        for module in model.modules():
            if module is not model and module is not layers[0] and any(part is layers[0] for part in module.modules()):
                module.register_forward_hook(self._catch)

    def _catch(self, module: nn.Module, inputs: object, output: Any) -> None:
        self._caught = module, output  # the outermost comes last

    def _select(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return inputs[0][:, _WANTED_N.get()], *inputs[1:]

    def rows_per_chunk(self, vocab_size: int) -> int:
        """Rows whose float32 logits fit in LOGITS_BYTES; at least one."""
        return max(1, LOGITS_BYTES // (4 * vocab_size))

    def logits(self, inputs: Mapping[str, Any], chunks: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Runs the model; yields float32 logits `[N, V]` of the rows of each chunk, the first may have none."""
        logits_NV = self._of_rows(inputs, chunks[0])
        caught, self._caught = self._caught, None
        yield logits_NV
        assert caught is not None, "the forward calls nothing that holds the layers"
        stack, output = caught
        for rows_N in chunks[1:]:
            del logits_NV  # before there are the next ones
            stack.forward = lambda *_, **__: output
            try:
                logits_NV = self._of_rows(inputs, rows_N)
            finally:
                del stack.forward
                self._caught = None  # the same again, of no use to anybody
            yield logits_NV

    def _of_rows(self, inputs: Mapping[str, Any], rows_N: torch.Tensor) -> torch.Tensor:
        _WANTED_N.set(rows_N)
        selection = {"logits_to_keep": rows_N} if self._keeps_rows else {}
        logits_NV: torch.Tensor = self._model(**inputs, **selection).logits[0].float()
        return logits_NV

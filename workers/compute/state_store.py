"""States of sequences in the arena that the coordinator owns: a compute worker that is lost leaves them to the next.

A sequence has two places, one of which is current. A pass reads that and writes the other, so that it may be repeated;
which is current from then on, the coordinator says when the pass is over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.workers.compute.mixers import Key
from flexgen_lite.workers.compute.recurrences import StateInPlace, marked


class StateStore:
    """Args:
    memory: uint8, `num_places` times the bytes of a sequence's state.
    """

    def __init__(self, memory: torch.Tensor, spec: ModelSpec, device: torch.device) -> None:
        size, num_places = spec.state_bytes, len(memory) // spec.state_bytes
        self._device = device
        self._views: dict[Key, torch.Tensor] = {}
        for state in spec.states:
            dtype = getattr(torch, state.dtype)
            strides = torch.empty(state.shape, device="meta").stride()
            view = memory.view(dtype).as_strided(
                (num_places, *state.shape), (size // dtype.itemsize, *strides), state.offset // dtype.itemsize
            )
            self._views[state.kind, state.layer, state.number] = view

    def in_place(self, key: Key, sources: Sequence[int], targets: Sequence[int]) -> torch.Tensor | None:
        """Stands for states that are read and written where they lie; None: they are not in float32, or not in the
        device's reach."""
        view = self._views[key]
        if view.dtype != torch.float32 or self._device.type != "cpu" or not view[0].is_contiguous():
            return None
        start, step = view.data_ptr(), 4 * view.stride(0)
        addresses = [torch.tensor(places, dtype=torch.long) * step + start for places in (sources, targets)]
        return marked((len(sources), *view.shape[1:]), StateInPlace(*addresses))

    def get(self, key: Key, places: Sequence[int]) -> torch.Tensor:
        return self._views[key][list(places)].to(self._device)

    def put(self, key: Key, places: Sequence[int], values: torch.Tensor) -> None:
        view = self._views[key]
        view[list(places)] = values.to(view.device, view.dtype)

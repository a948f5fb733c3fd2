"""The compute worker process: the Transformers forward, attention of prompts, sampling. One per device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from flexgen_lite import messages
from flexgen_lite.arena import map_arena
from flexgen_lite.memory_use import resident_bytes
from flexgen_lite.workers import serve
from flexgen_lite.workers.device import Device, open_device
from flexgen_lite.workers.exchange_region import ExchangeRegion
from flexgen_lite.workers.forward import Forward
from flexgen_lite.workers.model_open import OpenedModel, open_model


class ComputeWorker:
    def __init__(self, context: serve.Context) -> None:
        self._context = context
        self._device: Device | None = None
        self._opened: OpenedModel | None = None
        self._slots: list[torch.Tensor] = []  # uint8 views of the weights arena
        self._device_slots: list[torch.Tensor] = []
        self._regions: list[ExchangeRegion] = []
        self._bound: dict[int, int] = {}  # unit -> slot
        self._pass_id = -1
        self._forwards: dict[int, Forward] = {}
        torch.set_grad_enabled(False)

    def handle(self, message: Any) -> None:
        handlers: dict[type, Callable[[Any], None]] = {
            messages.Segment: self._segment,
            messages.BeginCompute: self._begin,
            messages.Upload: self._upload,
            messages.OpenModel: self._open,
            messages.AttachCompute: self._attach,
        }
        handlers[type(message)](message)

    def _open(self, order: messages.OpenModel) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._device = open_device(order.device)
        self._opened = open_model(order, self._device, self._context.run_dir)
        self._context.post(
            messages.ModelOpened(
                spec=self._opened.spec,
                tokenizer_file=self._opened.tokenizer_file,
                device_name=self._device.name,
                device_total_bytes=self._device.total_bytes,
                resident_bytes=sum(resident_bytes()),
            )
        )

    def _attach(self, order: messages.AttachCompute) -> None:
        assert self._device is not None and self._opened is not None
        serve.set_affinity(order.cpus)
        torch.set_num_threads(order.threads)
        weights = self._map("weights", order.arena_bytes)
        bounds = [*order.slot_offsets, order.arena_bytes]
        self._slots = [weights[bounds[i] : bounds[i + 1]] for i in range(len(order.slot_offsets))]
        if order.device_slots:
            self._device_slots = self._make_device_slots(order)
            self._move_buffers()
        dtype = getattr(torch, order.exchange.dtype)
        size = order.exchange.region_bytes
        exchange = self._map("exchange", size * order.exchange.num_regions)
        self._regions = [
            ExchangeRegion(exchange[i * size : (i + 1) * size], order.exchange.max_tokens, dtype)
            for i in range(order.exchange.num_regions)
        ]
        self._context.post(messages.Ready(sum(resident_bytes())))

    def _map(self, name: str, size: int) -> torch.Tensor:
        assert self._device is not None
        arena = torch.frombuffer(map_arena(self._context.arenas[name], size), dtype=torch.uint8)
        warning = self._device.page_lock(arena)
        if warning:
            print(warning, flush=True)
        return arena

    def _make_device_slots(self, order: messages.AttachCompute) -> list[torch.Tensor]:
        """Slots for layers, and a last one for everything outside them."""
        assert self._device is not None and self._opened is not None
        sizes = [order.device_slot_bytes] * order.device_slots + [self._opened.spec.units[-1].num_bytes]
        return [torch.empty(size, dtype=torch.uint8, device=self._device.torch_device) for size in sizes]

    def _move_buffers(self) -> None:
        """What the constructors computed (rotary frequencies and the like) goes to the device for good."""
        assert self._device is not None and self._opened is not None
        for module in self._opened.model.modules():
            for name, value in module._buffers.items():
                if value is not None and value.device.type != "meta":
                    module._buffers[name] = value.to(self._device.torch_device)

    def _begin(self, order: messages.BeginCompute) -> None:
        assert self._device is not None and self._opened is not None
        if order.threads != torch.get_num_threads():
            torch.set_num_threads(order.threads)
        self._pass_id = order.pass_id
        self._forwards = {
            batch.micro_batch: Forward(
                self._opened.model, self._device, self._opened.spec.attention, batch, self._regions[batch.region]
            )
            for batch in order.batches
        }

    def _upload(self, order: messages.Upload) -> None:
        assert self._device is not None and self._opened is not None
        num_bytes = self._opened.spec.units[order.unit].num_bytes
        start_ns = time.monotonic_ns()

        def done() -> None:
            self._context.post(
                messages.Uploaded(order.unit, order.device_slot, num_bytes, start_ns, time.monotonic_ns())
            )

        target, source = self._device_slots[order.device_slot], self._slots[order.slot]
        self._device.upload(target[:num_bytes], source[:num_bytes], done)

    def _segment(self, order: messages.Segment) -> None:
        assert self._device is not None and self._opened is not None
        assert order.pass_id == self._pass_id, f"segment of pass {order.pass_id} during pass {self._pass_id}"
        start_ns = time.monotonic_ns()
        self._bind(order)
        forward = self._forwards[order.micro_batch]
        forward.advance(order.layer)
        ended = order.layer == self._opened.spec.num_layers
        if ended:
            del self._forwards[order.micro_batch]

        def done() -> None:
            tokens = () if forward.token_ids is None else tuple(forward.token_ids.tolist())
            self._context.post(
                messages.SegmentDone(
                    order.pass_id, order.layer, order.micro_batch, start_ns, time.monotonic_ns(), tokens
                )
            )

        self._device.when_done(done)

    def _bind(self, order: messages.Segment) -> None:
        """Binds the layer's parameters to the slot that holds them."""
        assert self._opened is not None
        num_layers = self._opened.spec.num_layers
        slots = self._device_slots or self._slots
        if num_layers not in self._bound:
            outside = len(slots) - 1  # the last slot holds everything outside the layers
            self._opened.binding.bind(num_layers, slots[outside])
            self._bound[num_layers] = outside
        if order.layer < num_layers and self._bound.get(order.layer) != order.slot:
            self._opened.binding.bind(order.layer, slots[order.slot])
            self._bound[order.layer] = order.slot


if __name__ == "__main__":
    serve.run(messages.ToCompute, messages.FromCompute, ComputeWorker)

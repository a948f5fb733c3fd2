"""The compute worker process: the Transformers forward, attention of prompts, sampling. One per device."""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from flexgen_lite.memory.arena import map_arena, map_weights, take_large_pages
from flexgen_lite.memory.projection_units import units_of
from flexgen_lite.memory.usage import give_back_memory, resident_bytes
from flexgen_lite.model.spec import UnitSpec
from flexgen_lite.schedule.segment_queue import SegmentQueue
from flexgen_lite.text.sizes import format_size
from flexgen_lite.wire import worker_messages
from flexgen_lite.wire.doorbells import Note, ring
from flexgen_lite.workers import serve
from flexgen_lite.workers.compute import int8_rows, prefill_attention, recurrences
from flexgen_lite.workers.compute.device import Device, open_device
from flexgen_lite.workers.compute.exchange_region import ExchangeRegion
from flexgen_lite.workers.compute.forward import Forward, stop_at_layers
from flexgen_lite.workers.compute.heap import Heap
from flexgen_lite.workers.compute.host_projections import HostProjections
from flexgen_lite.workers.compute.model_open import OpenedModel, fingerprint, open_model
from flexgen_lite.workers.compute.sampling import read, read_scores
from flexgen_lite.workers.compute.state_store import StateStore
from flexgen_lite.workers.model.weight_map import Binding
from flexgen_lite.workers.model.weight_sources import compile_conversions

if TYPE_CHECKING:
    from flexgen_lite.workers.compute.workspace import Workspace


class ComputeWorker(serve.Worker):
    def __init__(self, context: serve.Context) -> None:
        self._context = context
        self._device: Device | None = None
        self._opened: OpenedModel | None = None
        self._slots: list[torch.Tensor] = []  # uint8 views of the weights arena
        self._device_slots: list[torch.Tensor] = []
        self._regions: list[ExchangeRegion] = []
        self._states: StateStore | None = None
        self._units: tuple[UnitSpec, ...] = ()
        self._projections: HostProjections | None = None
        self._batches: dict[int, worker_messages.TokenBatch] = {}
        self._bound: dict[int, int] = {}  # unit -> slot
        self._pass_id = -1
        self._forwards: dict[int, Forward] = {}
        self._queue = SegmentQueue((), 1)
        # With the pass; by any thread.
        self._ended: collections.deque[tuple[int, worker_messages.SegmentDone]] = collections.deque()
        self._streaming = False
        self._kv_in_int8 = False
        self._heap: Heap | None = None
        self._workspace_bytes = 0  # of a workspace that is still to be made
        self._workspace: Workspace | None = None
        torch.set_grad_enabled(False)

    def handle(self, message: Any) -> None:
        handlers: dict[type, Callable[[Any], None]] = {
            worker_messages.Segments: self._grant,
            worker_messages.BeginCompute: self._begin,
            worker_messages.Abandon: self._abandon,
            worker_messages.Upload: self._upload,
            worker_messages.Pack: self._pack,
            worker_messages.OpenModel: self._open,
            worker_messages.AttachCompute: self._attach,
        }
        handlers[type(message)](message)

    def _open(self, order: worker_messages.OpenModel) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._device = open_device(order.device)
        if self._device.torch_device.type == "cpu":
            recurrences.hush()
        self._opened = open_model(order, self._device, self._context.run_dir)
        stop_at_layers(self._opened.layers)
        prefill_attention.prepare(self._device.torch_device, getattr(torch, self._opened.spec.dtype))
        give_back_memory()  # of the trial and the probe: what is there now is in the plan
        self._context.post(
            worker_messages.ModelOpened(
                spec=self._opened.spec,
                fingerprint=fingerprint(self._opened),
                tokenizer_file=self._opened.tokenizer.file,
                chat_template=self._opened.tokenizer.chat_template,
                device_name=self._device.name,
                device_total_bytes=self._device.total_bytes,
                resident_bytes=sum(resident_bytes()),
            )
        )

    def _attach(self, order: worker_messages.AttachCompute) -> None:
        assert self._device is not None and self._opened is not None
        serve.set_affinity(order.cpus)
        torch.set_num_threads(order.threads)
        weights = self._tensor_of(map_weights(self._context.arenas, order.arena_bytes, order.shared))
        ends = dict(pairwise(sorted({*order.slot_offsets, order.arena_bytes})))
        self._streaming = order.streaming
        self._kv_in_int8 = order.kv_dtype == "int8"
        if self._kv_in_int8:
            int8_rows.prepare(self._device.torch_device, getattr(torch, self._opened.spec.dtype))
        self._device.limit_memory(order.device_budget)
        self._slots = [weights[offset : ends[offset]] for offset in order.slot_offsets]
        self._units = units_of(self._opened.spec, order.projection_layers)
        if order.projection_layers:
            self._keep_projections(order.projection_layers)
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
        if order.state_places:
            memory = self._map("states", order.state_places * self._opened.spec.state_bytes)
            self._states = StateStore(memory, self._opened.spec, self._device.torch_device)
        anonymous, files = resident_bytes()
        self._heap = Heap(order.process_bytes - files)
        self._workspace_bytes = order.workspace_bytes
        self._context.post(worker_messages.Ready(anonymous + files))

    def _keep_projections(self, layers: tuple[int, ...]) -> None:
        """Those of `layers` are computed on the CPU, from where they lie in main memory."""
        assert self._device is not None and self._opened is not None
        opened = self._opened
        opened.binding = Binding(opened.model, opened.layers, self._units)
        slots, dtype = self._slots[-len(layers) :], getattr(torch, opened.spec.dtype)
        self._projections = HostProjections(
            self._device, opened.binding, self._units, layers, slots, opened.projections, dtype
        )

    def _map(self, name: str, size: int) -> torch.Tensor:
        return self._tensor_of(map_arena(self._context.arenas[name], size))

    def _tensor_of(self, memory: memoryview) -> torch.Tensor:
        """Beside a GPU it is page-locked."""
        assert self._device is not None
        if self._device.total_bytes:
            take_large_pages(memory, 0, len(memory))  # what is locked can no longer be moved into them
        arena = torch.frombuffer(memory, dtype=torch.uint8)
        warning = self._device.page_lock(arena)
        if warning:
            print(warning, flush=True)
        return arena

    def _make_device_slots(self, order: worker_messages.AttachCompute) -> list[torch.Tensor]:
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

    def _begin(self, order: worker_messages.BeginCompute) -> None:
        assert self._device is not None and self._opened is not None
        if order.threads != torch.get_num_threads():
            torch.set_num_threads(order.threads)
        assert all(forward.dead for forward in self._forwards.values())
        if self._workspace_bytes:  # not before the weights have been packed: the pieces would stay in it
            self._make_workspace()
        self._pass_id = order.pass_id
        self._batches = {batch.micro_batch: batch for batch in order.batches}
        if self._projections is not None:
            self._projections.begin(order.batches)
        self._forwards = {
            batch.micro_batch: Forward(
                self._opened.model,
                self._device,
                self._opened.spec,
                batch,
                self._regions[batch.region],
                self._opened.products,
                self._opened.head,
                self._kv_in_int8,
                self._states,
            )
            for batch in order.batches
        }
        self._queue = SegmentQueue([len(batch.workers) for batch in order.batches], self._device.credit)

    def _make_workspace(self) -> None:
        from flexgen_lite.workers.compute.workspace import Workspace  # numba, which nothing needs on a GPU

        workspace, self._workspace_bytes = Workspace(self._workspace_bytes), 0
        if workspace.install():
            self._workspace = workspace

    def _warn_of_misses(self) -> None:
        workspace = self._workspace
        if workspace is not None and workspace.misses:
            self._workspace = None
            planned = format_size(workspace.num_bytes)
            print(f"warning: the workspace of {planned} is too small, other memory serves", flush=True)

    def _abandon(self, order: worker_messages.Abandon) -> None:
        assert self._device is not None
        self._device.synchronize()
        for forward in self._forwards.values():
            forward.abandon()
        self._forwards, self._batches, self._pass_id = {}, {}, -1
        self._queue = SegmentQueue((), 1)
        self._context.forget_items()
        self._context.post(worker_messages.Abandoned())

    def _upload(self, order: worker_messages.Upload) -> None:
        assert self._device is not None and self._opened is not None
        num_bytes = self._units[order.unit].num_bytes
        start_ns = time.monotonic_ns()

        def done() -> None:
            self._context.post(
                worker_messages.Uploaded(order.unit, order.device_slot, num_bytes, start_ns, time.monotonic_ns())
            )

        target, source = self._device_slots[order.device_slot], self._slots[order.slot]
        self._device.upload(target[:num_bytes], source[:num_bytes], done)

    def _pack(self, order: worker_messages.Pack) -> None:
        assert self._device is not None and self._opened is not None
        start_ns = time.monotonic_ns()
        self._bind(order.unit, order.slot)
        self._opened.products.pack(self._opened.modules(order.unit), order.copy_shared, order.in_order)
        self._device.give_back_memory()
        self._context.post(worker_messages.Packed(order.unit, start_ns, time.monotonic_ns()))

    def _grant(self, order: worker_messages.Segments) -> None:
        assert order.pass_id == self._pass_id, f"segments of pass {order.pass_id} during pass {self._pass_id}"
        for index, slot in enumerate(order.slots):
            for micro_batch in self._batches:
                self._queue.grant(order.column + index, micro_batch, slot)

    def heard(self, doorbell: str, note: Note) -> None:
        if note.pass_id == self._pass_id:
            self._queue.attended(note.column, note.micro_batch)

    def work(self) -> bool:
        """Tells of the segments that have ended, or starts the next one that may run. What is waited for is on its way
        before that: the slot of a layer that was left is free."""
        is_awaited = False
        while self._ended:
            pass_id, done = self._ended.popleft()
            if pass_id != self._pass_id:
                continue
            self._queue.done()
            self._pass_stop(done)
            is_awaited |= self._streaming or self._is_last(done.column)
            self._context.tell(done, at_once=is_awaited)
        if is_awaited:
            return True
        segment = self._queue.take()
        if segment is not None:
            self._run(*segment)
        return segment is not None or bool(self._ended)

    def _pass_stop(self, done: worker_messages.SegmentDone) -> None:
        """Nobody attends in a column that is a stop."""
        assert self._opened is not None
        if done.column in self._opened.spec.stops and not done.left_only:
            for _ in self._batches[done.micro_batch].workers:
                self._queue.attended(done.column, done.micro_batch)

    def report(self, items: tuple[worker_messages.SegmentDone, ...]) -> worker_messages.ComputeReport:
        assert self._device is not None
        return worker_messages.ComputeReport(self._pass_id, items, self._device.peak_bytes())

    def _run(self, column: int, micro_batch: int, slot: int | None) -> None:
        """A segment; without a slot only the part of it that ends before the layer of `column`."""
        assert self._device is not None and self._opened is not None
        start_ns = time.monotonic_ns()
        self._bind(self._opened.spec.num_layers, len(self._device_slots or self._slots) - 1)  # outside the layers
        uploaded = 0
        if slot is not None and not self._is_last(column):
            uploaded = self._enter(self._opened.spec.columns[column], slot)
        forward, batch, pass_id = self._forwards[micro_batch], self._batches[micro_batch], self._pass_id
        copied_ns, stops = forward.copy_ns, self._opened.spec.stops
        if slot is None:
            forward.leave(column - 1)
        else:
            forward.advance(column)
        copy_ns = forward.copy_ns - copied_ns
        if self._projections is not None:
            self._projections.forget_rows()

        def done(to_host_ns: int) -> None:
            if slot is not None and not self._is_last(column) and column not in stops:
                for worker in batch.workers:
                    ring(self._context.doorbells[str(worker)], Note(pass_id, column, micro_batch))
            read_back = [read(drawn, samples) for drawn, samples in forward.drawn]
            tokens = tuple(token for part, _ in read_back for token in part)
            logprobs = tuple(entry for _, part in read_back for entry in part)
            scores = tuple(entry for scored in forward.scores for entry in read_scores(scored))
            end_ns = time.monotonic_ns()
            times = start_ns, end_ns, copy_ns, to_host_ns
            report = worker_messages.SegmentDone(
                column, micro_batch, slot is None, *times, tokens, logprobs, scores, uploaded
            )
            self._ended.append((pass_id, report))
            self._context.wake()

        self._device.when_done(done)
        assert self._heap is not None
        self._heap.tidy()
        self._warn_of_misses()

    def _is_last(self, column: int) -> bool:
        assert self._opened is not None
        return column == len(self._opened.spec.columns)

    def _enter(self, layer: int, slot: int) -> int:
        """Has its weights at hand; bytes of them that had to be copied to the device for it."""
        self._bind(layer, slot)
        return 0 if self._projections is None else self._projections.enter(layer, self._device_slots[slot])

    def _bind(self, unit: int, slot: int) -> None:
        """Points the unit's parameters at the slot that holds them."""
        assert self._opened is not None
        if self._bound.get(unit) != slot:
            self._opened.binding.bind(unit, (self._device_slots or self._slots)[slot])
            self._bound[unit] = slot


def prepare() -> None:
    """What every model needs and none changes; a zygote has it done for the workers that it forks."""
    compile_conversions()


def main() -> None:
    prepare()
    serve.run(worker_messages.ToCompute, worker_messages.FromCompute, ComputeWorker)

"""One micro-batch on its way through the model: a greenlet that stops at every attention call.

The model is Transformers' own. Its forward runs in the greenlet; at a layer's attention call the new tokens' q, k and v
go into the exchange region and control returns to the worker, which runs other micro-batches meanwhile. When the
attention workers have answered, the forward goes on: prompts attend to themselves here, the rest is read back.

Shapes: T tokens of the micro-batch, A of them (the first rows) attended to by the attention workers, N sequences that
want a token; H, G, D, E as in attention_call.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import greenlet
import torch
from torch import nn
from transformers import PreTrainedModel

from flexgen_lite.memory.kv_layout import hadamard_orders
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.wire.sampling import Sample
from flexgen_lite.wire.worker_messages import TokenBatch
from flexgen_lite.workers.compute.attention_call import AttentionCall, ModelGreenlet
from flexgen_lite.workers.compute.device import Device
from flexgen_lite.workers.compute.exchange_region import ExchangeRegion
from flexgen_lite.workers.compute.head import Head
from flexgen_lite.workers.compute.int8_rows import rounded
from flexgen_lite.workers.compute.mixers import Mixer, StateSpan
from flexgen_lite.workers.compute.model_inputs import model_inputs
from flexgen_lite.workers.compute.prefill_attention import prompt_attention
from flexgen_lite.workers.compute.products import Products
from flexgen_lite.workers.compute.sampling import Drawn, Scores, sample, score
from flexgen_lite.workers.compute.state_store import StateStore
from flexgen_lite.workers.model.builder import text_config


class Forward(ModelGreenlet):
    """Runs `batch` up to each attention call in turn; `drawn` holds what came of it at the end."""

    def __init__(
        self,
        model: PreTrainedModel,
        device: Device,
        spec: ModelSpec,
        batch: TokenBatch,
        region: ExchangeRegion,
        products: Products,
        head: Head,
        kv_in_int8: bool,
        states: StateStore | None,
    ) -> None:
        super().__init__(self._forward)
        self._model = model
        self._device = device
        self._columns, self._kv_columns = spec.attention, spec.kv_columns
        self._stops = frozenset(spec.stops)
        self._states = states
        self._state_spans = [StateSpan(span.row, span.num_rows, span.state_from, span.state_to) for span in batch.spans]
        self._followed = {column for column, pair in enumerate(pairwise(spec.columns)) if pair[0] == pair[1]}
        self._batch = batch
        self._region = region
        self._products = products
        self._head = head
        self._kv_in_int8 = kv_in_int8
        self._behind_last_attention = contextlib.ExitStack()
        self._stops_at_entry = False
        self._reached = -1  # column whose attention call the forward stands at
        self._num_attended = sum(span.num_rows for span in batch.spans if not span.prefill)
        self.copy_ns = 0  # spent on the way into the exchange region and back
        self.samples = [span.sample for span in batch.spans if span.sample is not None]
        self.drawn: list[tuple[Drawn, list[Sample]]] = []  # of `samples`; on the host once the device is done
        self.scores: list[Scores] = []  # of the scored rows, in the order of the spans; likewise

    def advance(self, column: int) -> None:
        """Run up to the attention call of `column`, or to the end if there is no such column."""
        assert self._reached == column - 1, f"column {column} asked for, the forward stands at {self._reached}"
        with self._device.compute():
            self.switch()
        reached = column if column < len(self._columns) else column - 1
        assert self._reached == reached and self.dead == (column == len(self._columns)), "attention calls out of order"

    def leave(self, column: int) -> None:
        """Run behind the attention call of `column`, its layer's last, to the next layer's entry, which must exist."""
        assert self._reached == column, f"column {column} is to be left, the forward stands at {self._reached}"
        self._stops_at_entry = True
        with self._device.compute():
            self.switch()
        assert not self._stops_at_entry and not self.dead, "no entry of a layer behind the attention call"

    def abandon(self) -> None:
        """Leave the model, wherever the forward stands in it."""
        if self:  # it has begun, and not ended
            self.throw(greenlet.GreenletExit)

    def enter(self) -> None:
        """Called by the model, inside the greenlet, at each layer's entry."""
        if self._stops_at_entry:
            self._stops_at_entry = False
            parent = self.parent
            assert isinstance(parent, greenlet.greenlet)
            parent.switch()

    def _forward(self) -> None:
        batch = self._batch
        positions = [span.position + i for span in batch.spans for i in range(span.num_rows)]
        last = [span.row + span.num_rows - 1 for span in batch.spans if span.sample is not None]
        scored = [
            (span.row + span.scored.skip + i, target, span.scored.num_top)
            for span in batch.spans
            if span.scored is not None
            for i, target in enumerate(span.scored.targets)
        ]
        size = self._head.rows_per_chunk(text_config(self._model.config).vocab_size)
        samples = [self.samples[i : i + size] for i in range(0, len(last), size)] or [[]]
        sampled = [last[i : i + size] for i in range(0, len(last), size)] or [[]]
        chunks = [scored[i : i + size] for i in range(0, len(scored), size)]
        inputs = model_inputs(self._model, self._on_device(batch.token_ids)[None], self._on_device(positions)[None])
        self._asked_rows_N = self._on_device(sorted({*last, *(row for row, _, _ in scored)}))
        rows = [*sampled, *([row for row, _, _ in chunk] for chunk in chunks)]
        with self._behind_last_attention:
            logits = self._head.logits(inputs, [self._on_device(chunk) for chunk in rows])
            for part in samples:
                drawn = sample(next(logits), part)
                self.drawn.append((Drawn(self._on_host(drawn.integers), self._on_host(drawn.floats)), part))
            for chunk in chunks:
                targets_N = self._on_device([target for _, target, _ in chunk])
                found = score(next(logits), targets_N, [num_top for _, _, num_top in chunk])
                self.scores.append(self._scores_on_host(found))

    def _scores_on_host(self, scores: Scores) -> Scores:
        top_ids, top_values = (self._on_host(value.flatten()) for value in (scores.top_ids_NK, scores.top_values_NK))
        shape = scores.top_ids_NK.shape
        return Scores(
            self._on_host(scores.ranks_N),
            self._on_host(scores.values_N),
            top_ids.view(shape),
            top_values.view(shape),
            scores.num_top,
        )

    def _on_device(self, numbers: Sequence[int]) -> torch.Tensor:
        """int64, without waiting for what the device is doing."""
        buffer = self._device.host_buffer(len(numbers), torch.long)
        buffer.copy_(torch.tensor(numbers, dtype=torch.long))
        return self._device.from_host(buffer)

    def _on_host(self, value: torch.Tensor) -> torch.Tensor:
        buffer = self._device.host_buffer(value.numel(), value.dtype)
        self._device.to_host(buffer, value)
        return buffer

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """See ModelGreenlet.attend: called by the model, inside the greenlet."""
        self._reached += 1
        assert self._reached not in self._stops, f"column {self._reached} is a stop"
        assert call.spec == self._columns[self._reached], f"column {self._reached}: {call.spec} is not as described"
        start_ns = time.monotonic_ns()
        self._send(call)
        self.copy_ns += time.monotonic_ns() - start_ns
        parent = self.parent
        assert isinstance(parent, greenlet.greenlet)
        parent.switch()
        output = self._output(call)[None]
        if self._reached in self._followed:  # by another call of the layer, which may come before this is read
            output = output.clone()
        self._pass_last_column()
        return output

    def mix(self, mixer: Mixer, rows_1TD: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See ModelGreenlet.mix: called by the model, inside the greenlet."""
        assert self._states is not None
        output = mixer.run(rows_1TD, self._state_spans, self._states, args, kwargs)
        self.stop()
        return output

    def stop(self) -> None:
        """See ModelGreenlet.stop."""
        self._reached += 1
        assert self._reached in self._stops, f"column {self._reached} is no stop"
        parent = self.parent
        assert isinstance(parent, greenlet.greenlet)
        parent.switch()
        self._pass_last_column()

    def _pass_last_column(self) -> None:
        """Behind the last column only rows count of which something is asked."""
        if self._reached == len(self._columns) - 1:
            only = self._products.only(self._asked_rows_N, len(self._batch.token_ids))
            self._behind_last_attention.enter_context(only)

    def _send(self, call: AttentionCall) -> None:
        views = self._region.views(call.spec)
        tokens, attended = len(self._batch.token_ids), self._num_attended
        send, latents = self._device.to_host, call.latents
        if self._kv_columns[self._reached] == self._reached:
            key_BGTD = call.key_BGTD if latents is None else latents.keys()
            send(views.key_TGD[:tokens], key_BGTD[0].transpose(0, 1))
            if latents is None:
                send(views.value_TGE[:tokens], call.value_BGTE[0].transpose(0, 1))
        if attended:
            query_HAD = call.query_BHTD[0, :, :attended]
            query_HAD = query_HAD if latents is None else latents.absorb(query_HAD)
            send(views.query_THD[:attended], query_HAD.transpose(0, 1))
        if call.sinks_H is not None:
            send(views.sinks_H, call.sinks_H)

    def _output(self, call: AttentionCall) -> torch.Tensor:
        """The attention output, `[T, H, E]`."""
        attended, dtype, latents = self._num_attended, call.query_BHTD.dtype, call.latents
        prompts = [(span.row, span.num_rows) for span in self._batch.spans if span.prefill]
        heads, head_dim = call.query_BHTD.shape[1], call.query_BHTD.shape[3]
        if attended:
            from_workers = self._device.from_host(self._region.views(call.spec).out_THE[:attended]).to(dtype)
            if latents is not None:
                from_workers = latents.expand_output(from_workers, head_dim)
            if not prompts:
                return from_workers
        value_dim = call.value_BGTE.shape[3] if latents is None else latents.value_dim(heads, head_dim)
        out_THE = call.query_BHTD.new_empty((len(self._batch.token_ids), heads, value_dim))
        if attended:
            out_THE[:attended] = from_workers
        if latents is None:
            if self._kv_in_int8:
                key_order, value_order = hadamard_orders(self._columns[self._reached])
                key_BGTD = rounded(call.key_BGTD, key_order)
                value_BGTE = rounded(call.value_BGTE, value_order)
                call = dataclasses.replace(call, key_BGTD=key_BGTD, value_BGTE=value_BGTE)
            prompt_attention(call, prompts, out_THE)
            return out_THE
        latent_B1TR, rotary_B1TP = latents.latent_B1TR[:, :, attended:], latents.rotary_B1TP[:, :, attended:]
        if self._kv_in_int8:
            order, _ = hadamard_orders(self._columns[self._reached])
            row_B1TK = rounded(torch.cat((latent_B1TR, rotary_B1TP), dim=-1), order)
            latent_B1TR, rotary_B1TP = row_B1TK.split([latent_B1TR.shape[-1], rotary_B1TP.shape[-1]], dim=-1)
        key_BHTD, value_BHTE = latents.expand(latent_B1TR, rotary_B1TP)
        expanded = dataclasses.replace(
            call, query_BHTD=call.query_BHTD[:, :, attended:], key_BGTD=key_BHTD, value_BGTE=value_BHTE, latents=None
        )
        prompt_attention(expanded, [(row - attended, count) for row, count in prompts], out_THE[attended:])
        return out_THE


def stop_at_layers(layers: Sequence[nn.Module]) -> None:
    """Has a forward that runs through `layers` come by `Forward.enter` before each."""

    def hook(module: nn.Module, inputs: object) -> None:
        running = greenlet.getcurrent()
        if isinstance(running, Forward):
            running.enter()

    for layer in layers:
        layer.register_forward_pre_hook(hook)

"""What follows from an opened model and its plan: the arenas' layout, what each worker is told, schedule and queue."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.memory.kv_layout import kv_spec, token_bytes_by_window
from flexgen_lite.memory.projection_units import units_of
from flexgen_lite.model.quantization import IGNORED, Quantization
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.plan import plan
from flexgen_lite.plan.machine import Machine
from flexgen_lite.plan.need import Measured, shares_prefixes
from flexgen_lite.plan.shared import Planner
from flexgen_lite.plan.workload import Workload
from flexgen_lite.queue.admission import Limits
from flexgen_lite.queue.batching import Batcher
from flexgen_lite.queue.kv_on_disk import KvOnDisk
from flexgen_lite.queue.micro_batch import MicroBatch
from flexgen_lite.queue.page_table import PageTable, first_page
from flexgen_lite.queue.requests import Requests
from flexgen_lite.schedule.slot_ring import SlotRing
from flexgen_lite.schedule.zigzag import Schedule
from flexgen_lite.text.shown import shown_path
from flexgen_lite.tokens.tokenizer import TextTokenizer
from flexgen_lite.wire import worker_messages
from flexgen_lite.wire.arena_specs import ExchangeSpec, KvSpec, SharedPart
from flexgen_lite.wire.engine_share import EngineShare, SharedWeights
from flexgen_lite.wire.kv_on_disk import KvDiskSpec

ROWS_OF_A_PASS = {"memory": 32, "disk": 256, "device": 4096}
"""Rows whose products take about as long as a pass does for its weights alone, by where these come from: main memory at
tens of GB/s, a disk, or main memory for a device that computes a hundred times as fast."""


@dataclass(frozen=True, slots=True)
class Setup:
    opened: worker_messages.ModelOpened
    plan: plan.Plan
    kv: KvSpec
    exchange: ExchangeSpec
    kv_bytes_by_window: dict[int, int]  # of a token
    kv_disk: KvDiskSpec | None = None
    share: EngineShare | None = None  # None: there are no other engines

    @property
    def spec(self) -> ModelSpec:
        return self.opened.spec

    @property
    def decided(self) -> dict[str, Any]:
        """What "auto" came to where another start might come to something else, and a digest of the model's files: for
        an engine that is to take this one's place. How many sequences run at once, and how weights lie that other
        engines map: for those, and who starts them."""
        opened = self.opened
        files = repr((opened.fingerprint, opened.spec.files, opened.spec.stamps))
        return {
            "ram": self.plan.ram,
            "dtype": opened.spec.dtype,
            "device": "cuda" if opened.device_total_bytes else "cpu",
            "files": hashlib.blake2b(files.encode(), digest_size=8).hexdigest(),
            "max_sequences": self.plan.max_sequences,
            **({"weights": asdict(self.weights)} if self.plan.shares else {}),
        }

    @property
    def weights(self) -> SharedWeights:
        """How those lie that other engines map."""
        made, opened = self.plan, self.opened
        offsets = [offset for offset in made.slot_offsets if offset < made.shared_bytes]
        lie = repr((opened.fingerprint, opened.spec.files, opened.spec.stamps, offsets, made.projection_layers))
        digest = hashlib.blake2b(lie.encode(), digest_size=8).hexdigest()
        return SharedWeights(made.resident_layers, made.shared_bytes, digest)

    @property
    def units_there(self) -> frozenset[int]:
        """Those that lie in the arena, loaded and packed by another engine, before this one starts."""
        if self._fills_arena or not self.plan.shares:
            return frozenset()
        return frozenset({*self.plan.resident_layers, self.spec.num_layers})

    @property
    def ram(self) -> int:
        """Bytes of the budget that are this engine's: what engines share is the first one's."""
        other = self.share is not None and self.share.number > 0
        return self.plan.ram - (self.plan.shared_bytes if other else 0)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.opened, self.kv.dtype)

    @property
    def arena_bytes(self) -> dict[str, int]:
        exchange = self.exchange.num_regions * self.exchange.region_bytes
        states = self.plan.state_places * self.spec.state_bytes
        made = self.plan
        return {
            "weights": made.weights_bytes - made.shared_bytes,
            "kv": self.kv.arena_bytes,
            "exchange": exchange,
            "states": states,
            **({"shared": made.shared_bytes} if made.shares and self._fills_arena else {}),
        }

    @property
    def _fills_arena(self) -> bool:
        """Of the weights that engines share, if they do."""
        return self.share is None or self.share.weights is None

    @property
    def _shared_part(self) -> SharedPart | None:
        """Beside a GPU it is writable, or it could not be page-locked."""
        if not self.plan.shares:
            return None
        return SharedPart(self.plan.shared_bytes, not self.units_there or self.opened.device_total_bytes > 0)

    @property
    def packed_units(self) -> frozenset[int]:
        """Those that stay where they are loaded to and are computed with there: for the order that products want."""
        layers = self.spec.num_layers
        stay = frozenset(range(layers + 1)) - frozenset(self.plan.ring_layers(layers))
        return frozenset() if self.plan.staged else stay

    def kv_read_bytes(self, micro_batches: Iterable[MicroBatch]) -> int:
        """Bytes of the KV cache that a pass reads for sequences that it computes one token of."""
        lengths = [p.request.stored + 1 for m in micro_batches for p in m.pieces if p.num_rows == 1 and not p.prefill]
        return sum(
            size * sum(min(length, window or length) for length in lengths)
            for window, size in self.kv_bytes_by_window.items()
        )

    def moved_state_bytes(self, micro_batches: Iterable[MicroBatch]) -> int:
        """Bytes of states that a pass reads and writes."""
        pieces = [piece for micro_batch in micro_batches for piece in micro_batch.pieces]
        return self.spec.state_bytes * sum(1 if piece.prefill else 2 for piece in pieces)

    # ------------------------------------------------------------------------------------------------ for workers

    def for_loader(self, load_format: str, verify: bool) -> worker_messages.AttachLoader:
        made, spec = self.plan, self.spec
        return worker_messages.AttachLoader(
            spec.files,
            spec.stamps,
            units_of(spec, made.projection_layers),
            made.slot_offsets + made.projection_offsets,
            made.weights_bytes,
            load_format,
            verify,
            made.loader_threads,
            made.loader_cpus,
            self.kv_disk,
            self._shared_part,
        )

    def for_attention(self, index: int) -> worker_messages.AttachAttention:
        made = self.plan
        return worker_messages.AttachAttention(
            self.spec.attention,
            self.spec.kv_columns,
            self.exchange,
            self.kv,
            made.attention_threads,
            made.attention_cpus[index],
            first_page(made.num_pages, made.attention_workers, index),
            len(self.spec.stops),
        )

    def for_compute(self) -> worker_messages.AttachCompute:
        made = self.plan
        return worker_messages.AttachCompute(
            made.slot_offsets + made.projection_offsets,
            made.weights_bytes,
            self.exchange,
            made.device_slots,
            made.layer_slot_bytes,
            made.gpu - plan.CUDA_CONTEXT_BYTES if self.opened.device_total_bytes else 0,
            bool(made.device_slots or made.layer_slots),
            made.compute_threads,
            made.compute_cpus,
            made.process_bytes["compute worker"],
            0 if self.opened.device_total_bytes else made.parts["workspace"],
            self.kv.dtype,
            made.state_places,
            made.projection_layers,
            self._shared_part,
        )

    # ------------------------------------------------------------------------------------------------ for the passes

    def make_schedule(self) -> Schedule:
        """Slot numbers: resident layers in order, the ring, everything outside the layers, projections."""
        made, layers = self.plan, self.spec.num_layers
        last = len(made.slot_offsets) - 1
        projections = {layer: number for number, layer in enumerate(made.projection_layers, start=1)}
        beside = {layer: layers + number for layer, number in projections.items()}
        resident = {layer: slot for slot, layer in enumerate(made.resident_layers)}
        pinned = {layers: last}
        for layer in range(layers):  # in the order of a pass
            pinned |= {beside[layer]: last + projections[layer]} if layer in beside else {}
            pinned |= {layer: resident[layer]} if layer in resident else {}
        ring = range(len(made.resident_layers), last)
        host = SlotRing(pinned, made.ring_layers(layers), tuple(ring), made.device_alone)
        if not made.staged:
            return Schedule(self.spec.columns, host, stops=self.spec.stops)
        stay = dict(zip(made.device_layers, range(made.device_slots), strict=False))
        streamed = [layer for layer in range(layers) if layer not in stay]
        device = SlotRing({layers: made.device_slots} | stay, streamed, range(len(stay), made.device_slots))
        return Schedule(self.spec.columns, host, device, self.spec.stops, beside)

    @property
    def kv_tokens(self) -> int:
        """Of the longest sequence that an attention worker can hold."""
        made = self.plan
        table = PageTable(made.num_pages, made.kv_groups, made.attention_workers)
        return table.max_tokens(made.micro_batch_tokens)

    def make_batcher(self, share_prefixes: bool | None) -> Batcher:
        """`share_prefixes`: as in the configuration."""
        made, spec = self.plan, self.spec
        where = "device" if made.staged else "disk" if made.ring_layers(spec.num_layers) else "memory"
        table = PageTable(made.num_pages, made.kv_groups, made.attention_workers)
        return Batcher(
            table,
            made.max_sequences,
            made.micro_batches,
            made.micro_batch_tokens,
            made.spread,
            shares_prefixes(share_prefixes, spec),
            ROWS_OF_A_PASS[where],
            made.state_places // 2,
            self._make_kv_on_disk(table),
        )

    def _make_kv_on_disk(self, table: PageTable) -> KvOnDisk | None:
        disk = self.kv_disk
        if disk is None:
            return None
        of_prefixes = disk.prefix_slots * disk.pages_of_block
        num_slots = self.plan.kv_disk // disk.slot_bytes - of_prefixes
        state_slots = -(-disk.state_bytes // disk.slot_bytes)
        return KvOnDisk(table, self.plan.kv_groups, num_slots, state_slots, disk.prefix_slots)

    def make_requests(self, share_prefixes: bool | None, tokenizer: TextTokenizer | None) -> Requests:
        spec = self.spec
        eos = tuple(token for token in spec.eos_token_ids if 0 <= token < spec.vocab_size)
        prefix = spec.bos_token_id if spec.bos_token_id is not None else next(iter(eos), None)
        limits = Limits(spec.max_length, self.kv_tokens, spec.vocab_size, eos, prefix)
        return Requests(self.make_batcher(share_prefixes), limits, tokenizer)


def fingerprint_of(opened: worker_messages.ModelOpened, kv_dtype: str) -> str:
    """The same as long as the same prompt gets the same greedy tokens: the model's, and the type of KV."""
    if kv_dtype == opened.spec.dtype:
        return opened.fingerprint
    text = f"{opened.fingerprint} KV {kv_dtype}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def order_to_open(config: EngineConfig, dtype: str) -> worker_messages.OpenModel:
    """`dtype`: the config's, or what "auto" came to before."""
    return worker_messages.OpenModel(
        config.model,
        config.load_format,
        dtype,
        config.device,
        False,
        config.max_model_len,
        _quantization(config),
        config.activations,
    )


def _quantization(config: EngineConfig) -> Quantization | None:
    """What is asked of the weights; None: nothing."""
    if config.quantization == "auto":
        return None
    return Quantization(
        bits=8 if config.quantization == "int8" else 4,
        group_size=config.quantization_group_size,
        ignore=IGNORED if config.quantization_ignore is None else config.quantization_ignore,
        activations="int8" if config.activations == "int8" else "bfloat16",
        symmetric=config.quantization_symmetric,
    )


def open_tokenizer(file: str | None) -> TextTokenizer | None:
    """Raises PlanError where the file is no tokenizer."""
    try:
        return TextTokenizer(file) if file else None
    except Exception as error:  # the library raises nothing narrower
        raise plan.PlanError(
            f"{file} cannot be used ({shown_path(error)}): download it again, or move it away and give prompts as "
            "token ids"
        ) from error


def set_up(
    opened: worker_messages.ModelOpened,
    config: EngineConfig,
    machine: Machine,
    expected: Workload | None,
    processes: Measured,
    share: EngineShare | None = None,
) -> Setup:
    """Raises PlanError where the budget does not hold even the smallest plan."""
    spec, device_bytes = opened.spec, opened.device_total_bytes
    given = None if share is None else share.weights
    if share is None:
        made = plan.make_plan(config, spec, machine, processes, device_bytes > 0, device_bytes, expected)
    else:
        on_gpu, engines = device_bytes > 0, (share.count, share.ram)
        made = Planner(config, spec, processes, on_gpu, device_bytes, expected, *engines).plan(machine, given)
    kv = kv_spec(spec.attention, spec.kv_columns, made.kv_groups, made.num_pages, made.kv_dtype)
    exchange = ExchangeSpec(made.micro_batches, made.region_bytes, made.micro_batch_tokens, spec.dtype)
    calls = [call for column, call in enumerate(spec.attention) if column not in spec.stops]
    setup = Setup(opened, made, kv, exchange, token_bytes_by_window(calls, made.kv_dtype), share=share)
    if given is not None and setup.units_there and given.layout not in ("", setup.weights.layout):
        raise plan.PlanError(f"{config.model}, or how it is read, changed while engines were using it: start anew")
    return setup

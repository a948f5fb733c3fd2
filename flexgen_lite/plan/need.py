"""What a model and its settings ask for: bytes of each process and part, KV pages that are of use. Pure logic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.memory.arena import LARGE_PAGE
from flexgen_lite.memory.exchange import region_bytes
from flexgen_lite.memory.kv_groups import kv_groups, pages_for
from flexgen_lite.memory.kv_layout import BOUNCE_BYTES, disk_slot_bytes, largest_page
from flexgen_lite.model.spec import ITEM_BYTES, ModelSpec
from flexgen_lite.plan.layer_sizes import LayerSizes, layer_sizes
from flexgen_lite.plan.machine import Machine
from flexgen_lite.plan.workload import Workload
from flexgen_lite.wire.arena_specs import KvGroup
from flexgen_lite.wire.sampling import LOGITS_BYTES

MIB = 1 << 20
# Measured, resident, with some room: anonymous memory. Mapped files count once, for the compute worker: it maps every
# library that the others do, except beside a GPU, where it does without numba.
QUEUE_BYTES = 64 * MIB  # what the coordinator takes beyond what it has at the start: requests, logprobs, answers
CLIENT_BYTES = 50 * MIB  # the process that reads prompts and writes results
LOADER_BYTES = 30 * MIB
CONVERTING_LOADER_BYTES = 90 * MIB
QUANTISING_LOADER_BYTES = 120 * MIB
UNPACKED_ITEM_BYTES = (
    16  # of an item that is unpacked with the whole of its weight: as it is read, as codes, twice as floats
)
PREFIX_TABLE_BYTES = 12 * MIB  # what is known of the file of stored prefixes, in each process
NUMBA_BYTES = 95 * MIB
SPANS_BYTES = 20 * MIB  # what an attention worker takes beyond what it has at the start: a pass's spans, partial sums
ZYGOTE_BYTES = {"cpu": 48 * MIB, "gpu": 64 * MIB}  # what it does not share with the compute worker
ALLOCATOR_SLACK = 1.25  # what the allocator keeps beyond what is in use
PRODUCTS_BYTES = 80 * MIB  # on a CPU: programs that oneDNN keeps (KEPT_PRODUCTS), results on their way
PRODUCTS_OTHER_BYTES = 32 * MIB  # of them, beside what the threads have of their own
THREAD_ROWS_BYTES = 320  # of a thread, for each item of a row: 64 rows in float32, weights that are put in order
THREAD_WORDS_BYTES, THREADS_WORDS_BYTES = 4 * MIB, 64 * MIB  # of one, and of all: rows that are put in order
ROUNDED_GROUP_BYTES = 6  # of a group of rows that are rounded to 8 bits, for each byte of a row: three numbers
STATES_BYTES = 96 * MIB  # of copies of states, and what is made of them for single tokens
UNPACKING_BYTES = {"cpu": 40 * MIB, "gpu": 160 * MIB}  # of a weight in few bits, some columns at a time
SAMPLING_BYTES = 64  # for each entry of the vocabulary, to draw from a row of logits: sorted, in double precision
PAGE_TOKENS = 16
DEVICE_RING = 3  # slots of a GPU through which layers come: one in use, one being copied, one ready
MAX_SEQUENCES = 256
MOST_ROWS = 2048  # of a prompt in one pass
LEAST_LENGTH = 256  # tokens of a sequence that each attention worker must be able to hold
MODEST_LENGTH = 4096  # tokens of a sequence that any budget has room for which is said to be enough
TYPICAL_LENGTH = 1024  # tokens of a sequence that auto makes room for


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes that processes take before there is any work.

    Attributes:
        compute: of the compute worker, mapped files among them.
        coordinator: of the coordinator, with the tokenizer.
        attention: of each attention worker, with its kernels.
    """

    compute: int
    coordinator: int
    attention: int


@dataclass(frozen=True, slots=True)
class Sharing:
    """What stays in main memory lies apart, up to a multiple of LARGE_PAGE, where other engines map it too.

    Attributes:
        engines: how many.
        resident: layers that stay there, where that was decided before; None: it is open.
    """

    engines: int
    resident: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Need:
    """What the model and the settings ask for, before the block's shape is chosen."""

    config: EngineConfig
    spec: ModelSpec
    processes: dict[str, int]
    workers: int
    kv_dtype: str
    kv_groups: tuple[KvGroup, ...]
    page: int  # bytes
    least_pages: int
    longest: int  # tokens of the longest sequence that should be served
    layers: LayerSizes
    max_sequences: int
    wanted_pages: int  # that weights should leave room for
    most_pages: int  # that can ever be of use
    on_gpu: bool
    device_bytes: int  # of RAM, where the CPU plays the device's part
    compute_threads: int
    sharing: Sharing | None = None  # with other engines of the machine; None: there are none

    @property
    def state_bytes(self) -> int:
        """Of a sequence, in both its places."""
        return 2 * self.spec.state_bytes

    def fixed(self, tokens: int, count: int) -> dict[str, int]:
        """Bytes per part that do not depend on what is left of the budget."""
        region = region_bytes(self.spec.attention, tokens, ITEM_BYTES[self.spec.dtype])
        computes_here = not self.on_gpu or self.layers.split
        return {
            **self.processes,
            "workspace": _workspace_bytes(self.spec, tokens, count, self.on_gpu),
            **({"products": _products_bytes(self.spec, self.compute_threads)} if computes_here else {}),
            "exchange": count * region,
            "embeddings and head": self.spec.units[-1].num_bytes + (LARGE_PAGE if self.sharing else 0),
            **({"device slots": self.device_bytes} if self.device_bytes else {}),
        }

    def longest_pages(self, tokens: int) -> int:
        """KV pages with which each worker can hold the longest sequence, in micro-batches of so many tokens."""
        return max(self.least_pages, self.workers * pages_for(self.kv_groups, self.longest, tokens))

    def least(self, tokens: int, count: int, slots: int, pages: int | None = None) -> int:
        """RAM below which the engine cannot run with this block, so many layer slots, and KV pages."""
        kv = (pages or self.least_pages) * self.page
        return sum(self.fixed(tokens, count).values()) + self.least_weights(slots) + kv + self.state_bytes

    @property
    def engines(self) -> int:
        """That map the layers that stay."""
        return self.sharing.engines if self.sharing else 1

    def least_weights(self, slots: int) -> int:
        """Bytes of so many slots for layers, those that must stay beside them, and what is apart."""
        resident = None if self.sharing is None else self.sharing.resident
        if resident is None:
            return slots * self.layers.whole + self.layers.apart
        ring = slots if len(resident) < self.spec.num_layers else 0
        return len(resident) * self.layers.without + ring * self.layers.whole + self.layers.apart


def num_attention_workers(config: EngineConfig, machine: Machine) -> int:
    """One per NUMA node, so that each works on memory of its own; known before the model is."""
    if config.attention_workers is not None:
        return config.attention_workers
    return len(config.attention_cpus) if config.attention_cpus else min(machine.numa_nodes, machine.num_threads)


def num_compute_threads(config: EngineConfig, machine: Machine, on_gpu: bool) -> int:
    return config.compute_threads or (min(4, machine.num_threads) if on_gpu else machine.num_threads)


def sizes_of_layers(config: EngineConfig, spec: ModelSpec, on_gpu: bool) -> LayerSizes:
    return layer_sizes(spec, config.cpu_projections == "qkv" and (on_gpu or _on_cpu_slots(config, on_gpu)))


def _on_cpu_slots(config: EngineConfig, on_gpu: bool) -> bool:
    """The CPU plays the device's part."""
    return config.stage_weights is True and not on_gpu


def need_of(
    config: EngineConfig,
    spec: ModelSpec,
    machine: Machine,
    processes: Measured,
    on_gpu: bool,
    expected: Workload | None,
    sharing: Sharing | None = None,
) -> Need:
    workers = num_attention_workers(config, machine)
    on_cpu_slots = _on_cpu_slots(config, on_gpu)
    layers = sizes_of_layers(config, spec, on_gpu)
    kv_dtype = config.stored_kv_dtype(spec.dtype)
    groups = kv_groups(spec.attention, spec.kv_columns, config.page_tokens or PAGE_TOKENS, kv_dtype, spec.max_length)
    max_sequences = config.max_sequences or min(MAX_SEQUENCES, expected.sequences if expected else MAX_SEQUENCES)
    shortest = min(spec.max_length, LEAST_LENGTH)
    least_pages = workers * pages_for(groups, shortest, shortest)
    longest = spec.max_length if config.max_model_len else MODEST_LENGTH
    longest = min(spec.max_length, expected.longest_likely if expected else longest)
    wanted_pages, most_pages = _pages_of_use(spec, workers, groups, max_sequences, expected)
    page = largest_page(spec.attention, groups, kv_dtype)
    loader = _loader_bytes(spec) if config.load_format != "dummy" else LOADER_BYTES
    loader += _kv_disk_bytes(config, spec, page)
    return Need(
        config=config,
        spec=spec,
        processes={
            "coordinator": processes.coordinator + QUEUE_BYTES + _prefix_table_bytes(config, spec),
            "client": CLIENT_BYTES,
            "loader": loader,
            "attention workers": (NUMBA_BYTES if on_gpu else 0) + (processes.attention + SPANS_BYTES) * workers,
            "compute worker": processes.compute + (NUMBA_BYTES if on_gpu and layers.split else 0),
            "zygote": ZYGOTE_BYTES["gpu" if on_gpu else "cpu"],
        },
        workers=workers,
        kv_dtype=kv_dtype,
        kv_groups=groups,
        page=page,
        least_pages=least_pages,
        longest=longest,
        layers=layers,
        max_sequences=max_sequences,
        wanted_pages=max(least_pages, wanted_pages),
        most_pages=max(least_pages, most_pages),
        on_gpu=on_gpu,
        device_bytes=(
            min(config.device_slots or DEVICE_RING, spec.num_layers) * layers.whole + spec.units[-1].num_bytes
            if on_cpu_slots
            else 0
        ),
        compute_threads=num_compute_threads(config, machine, on_gpu),
        sharing=sharing,
    )


def _products_bytes(spec: ModelSpec, threads: int) -> int:
    widest = max(spec.intermediate_size, spec.hidden_size)
    of_rows = threads * min(THREAD_WORDS_BYTES, THREADS_WORDS_BYTES // threads)
    packed = (tensor.packing for unit in spec.units for tensor in unit.tensors if tensor.packing is not None)
    groups = [packing.group for packing in packed if packing.rounds_rows]
    of_rows += of_rows * ROUNDED_GROUP_BYTES // min(groups) if groups else 0
    return max(PRODUCTS_BYTES, PRODUCTS_OTHER_BYTES + of_rows + threads * THREAD_ROWS_BYTES * widest)


def _kv_disk_bytes(config: EngineConfig, spec: ModelSpec, page: int) -> int:
    """Of the loader: a buffer, and what it knows of the file of prefixes."""
    if config.kv_disk is None:
        return 0
    return max(BOUNCE_BYTES, disk_slot_bytes(page)) + _prefix_table_bytes(config, spec)


def _prefix_table_bytes(config: EngineConfig, spec: ModelSpec) -> int:
    """Of the coordinator as well, which chooses blocks."""
    return PREFIX_TABLE_BYTES if config.kv_disk and shares_prefixes(config.prefix_caching, spec) else 0


def shares_prefixes(asked: bool | None, spec: ModelSpec) -> bool:
    """What `prefix_caching` comes to: prompts share their beginning in float32 only if nothing is asked for, and a
    state is of its sequence's end alone."""
    return (spec.dtype == "float32" if asked is None else asked) and not spec.states


def _loader_bytes(spec: ModelSpec) -> int:
    if spec.has_few_bits:
        return QUANTISING_LOADER_BYTES + UNPACKED_ITEM_BYTES * _most_unpacked(spec)
    return CONVERTING_LOADER_BYTES if any(unit.converted for unit in spec.units) else LOADER_BYTES


def _most_unpacked(spec: ModelSpec) -> int:
    """Items of the largest weight that is unpacked while it is loaded, all of it at once."""
    pieces = (piece for unit in spec.units for tensor in unit.tensors for piece in tensor.pieces)
    whole = (math.prod(piece.source_shape) for piece in pieces if piece.part is not None and piece.part.packing)
    return max(whole, default=0)


def _pages_of_use(
    spec: ModelSpec, workers: int, groups: Sequence[KvGroup], max_sequences: int, expected: Workload | None
) -> tuple[int, int]:
    """(KV pages that weights should leave room for, pages that can ever be of use). Each worker's share is in whole
    sequences, and holds the longest of those expected."""

    def pages(sequences: int, tokens: int, rows: int = 1) -> int:
        return workers * -(-sequences // workers) * pages_for(groups, min(spec.max_length, tokens), rows)

    most = pages(max_sequences, expected.longest_tokens if expected else spec.max_length, MOST_ROWS)
    typical = pages(max_sequences, expected.typical_tokens if expected else TYPICAL_LENGTH)
    longest = pages(workers, expected.longest_tokens) if expected else 0
    return min(most, max(typical, longest)), most


def _workspace_bytes(spec: ModelSpec, tokens: int, count: int, on_gpu: bool) -> int:
    """Temporaries of the compute worker: one running micro-batch, the suspended ones, a weight that is unpacked, logits
    and attention scores."""
    item = ITEM_BYTES[spec.dtype]
    width = max(layer.exchange_width for layer in spec.attention)
    heads = max(layer.num_heads for layer in spec.attention)
    running = tokens * max(item * (3 * spec.intermediate_size + 6 * spec.hidden_size + width), spec.pass_bytes)
    suspended = (count - 1) * tokens * max(item * (3 * spec.hidden_size + width), spec.held_bytes)
    rows = min(tokens, max(1, LOGITS_BYTES // (4 * spec.vocab_size)))
    # As the model gives them and once more, in float32, which of them are larger than another, one row to draw from.
    logits = spec.vocab_size * (rows * (2 * item + 4 + 1) + SAMPLING_BYTES)
    scores = heads * 128 * min(tokens, spec.max_length) * 4 * 2
    unpacking = UNPACKING_BYTES["gpu" if on_gpu else "cpu"] if spec.has_few_bits else 0
    mixing = max(spec.mix_bytes, STATES_BYTES) if spec.states else 0
    return int((running + suspended + mixing + max(logits, scores)) * ALLOCATOR_SLACK) + unpacking

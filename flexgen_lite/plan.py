"""Turns budgets into a plan: what is placed where, before anything is allocated. Pure logic.

Everything the engine takes of main memory is in `Plan.parts`; what does not fit is refused with the number that would.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexgen_lite.config import EngineConfig
from flexgen_lite.exchange import region_bytes
from flexgen_lite.kv_layout import page_bytes
from flexgen_lite.machine import Machine
from flexgen_lite.model_spec import ITEM_BYTES, ModelSpec
from flexgen_lite.sizes import format_size

MIB = 1 << 20
COORDINATOR_BYTES = 110 * MIB  # measured, with a tokenizer of 50,000 entries
CLIENT_BYTES = 70 * MIB  # the process that reads prompts and writes results
LOADER_BYTES = 60 * MIB
CONVERTING_LOADER_BYTES = 240 * MIB  # with numba and bounce buffers
ATTENTION_BYTES = 170 * MIB
ALLOCATOR_SLACK = 1.25  # what the allocator keeps beyond what is in use
AUTO_RAM_SHARE = 0.85
TYPICAL_LENGTH = 1024  # tokens of a sequence that auto makes room for
SHAPES = ((2048, 4), (2048, 2), (1024, 2), (512, 2), (256, 2), (128, 2), (64, 1))  # micro-batch tokens, micro-batches


class PlanError(ValueError):
    """A budget or a setting that cannot be met; names what is needed and what would lower it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Slots are numbered by `slot_offsets`; the last holds everything outside the layers."""

    ram: int
    gpu: int
    staged: bool
    resident_layers: tuple[int, ...]
    layer_slots: int  # of the ring; 0 where every layer is resident
    slot_offsets: tuple[int, ...]
    layer_slot_bytes: int
    weights_bytes: int
    device_slots: int
    num_pages: int
    page_tokens: int
    max_sequences: int
    micro_batches: int
    micro_batch_tokens: int
    spread: bool
    region_bytes: int
    attention_workers: int
    attention_threads: int
    compute_threads: int
    loader_threads: int
    attention_cpus: tuple[tuple[int, ...], ...]
    compute_cpus: tuple[int, ...]
    loader_cpus: tuple[int, ...]
    parts: dict[str, int]  # bytes of main memory per part

    @property
    def planned_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def kv_tokens(self) -> int:
        return self.num_pages * self.page_tokens

    def streamed_layers(self, num_layers: int) -> tuple[int, ...]:
        return tuple(layer for layer in range(num_layers) if layer not in set(self.resident_layers))


def auto_ram(machine: Machine) -> int:
    return int(machine.available_ram * AUTO_RAM_SHARE)


def make_plan(config: EngineConfig, spec: ModelSpec, machine: Machine, compute_bytes: int, on_gpu: bool, gpu_total: int) -> Plan:
    """Raises PlanError where the budget does not hold even the smallest plan.

    Args:
        compute_bytes: what the compute worker takes before it has seen a token.
        gpu_total: memory of the GPU, 0 where there is none.
    """
    ram = config.ram or auto_ram(machine)
    workers = num_attention_workers(config, machine)
    threads = _attention_threads(config, machine, workers, on_gpu)
    converting = any(unit.converted for unit in spec.units) and config.load_format != "dummy"
    processes = {
        "coordinator": COORDINATOR_BYTES + CLIENT_BYTES,
        "loader": CONVERTING_LOADER_BYTES if converting else LOADER_BYTES,
        "attention workers": ATTENTION_BYTES * workers,
        "compute worker": compute_bytes,
    }
    page_tokens = config.page_tokens or 16
    page = page_bytes(spec.attention, page_tokens, spec.dtype)
    layer_slot = max(unit.num_bytes for unit in spec.units[:-1])
    outside = spec.units[-1].num_bytes
    slots = min(config.layer_slots or 3, spec.num_layers)
    all_layers = layer_slot * spec.num_layers
    max_sequences = config.max_sequences or 256
    wanted_tokens = max_sequences * min(spec.max_length, TYPICAL_LENGTH)
    least_pages = workers * -(-min(spec.max_length, 256) // page_tokens)

    shape = None
    for tokens, count in _shapes(config, on_gpu):
        shape = (tokens, count)
        region = region_bytes(spec.attention, tokens, ITEM_BYTES[spec.dtype])
        work = _workspace_bytes(spec, tokens, count, max_sequences)
        fixed = {**processes, "workspace": work, "exchange": count * region, "embeddings and head": outside}
        rest = ram - sum(fixed.values()) - layer_slot * slots - page * least_pages
        if rest >= 0 and (work + count * region <= ram // 4 or (tokens, count) == _shapes(config, on_gpu)[-1]):
            break
    assert shape is not None
    tokens, count = shape
    if rest < 0:
        raise PlanError(
            f"{spec.class_name} needs at least {format_size(ram - rest)} of RAM, {format_size(ram)} allowed: "
            f"raise ram, or lower one of micro_batch_tokens ({tokens}), max_sequences ({max_sequences}), "
            f"attention_workers ({workers})" + (", or use --dtype bfloat16" if spec.dtype == "float32" else "")
        )
    available = ram - sum(fixed.values())
    most_pages = -(-max_sequences * spec.max_length // page_tokens)
    wanted_pages = min(most_pages, max(least_pages, -(-wanted_tokens // page_tokens)))
    stream = config.layer_slots is not None and config.layer_slots < spec.num_layers
    if not stream and all_layers + page * least_pages <= available and (
        all_layers + page * wanted_pages <= available or all_layers <= 0.75 * available
    ):
        resident: tuple[int, ...] = tuple(range(spec.num_layers))
        ring = 0
    else:
        after_slots = available - slots * layer_slot
        kv_pages = min(wanted_pages, after_slots // page)
        spare = 0 if stream else (after_slots - kv_pages * page) // layer_slot
        resident = spread_evenly(min(spare, spec.num_layers - slots), spec.num_layers)
        ring = slots
    layer_bytes = (len(resident) + ring) * layer_slot
    num_pages = min(most_pages, max(least_pages, (available - layer_bytes) // page))
    num_slots = len(resident) + ring
    offsets = tuple(i * layer_slot for i in range(num_slots + 1))
    staged = on_gpu if config.stage_weights is None else config.stage_weights
    gpu = config.gpu or int(gpu_total * 0.9)
    device_slots = _device_slots(spec, staged, on_gpu, gpu, layer_slot, outside, work)
    return Plan(
        ram=ram,
        gpu=gpu,
        staged=staged,
        resident_layers=resident,
        layer_slots=ring,
        slot_offsets=offsets,
        layer_slot_bytes=layer_slot,
        weights_bytes=layer_bytes + outside,
        device_slots=device_slots,
        num_pages=num_pages,
        page_tokens=page_tokens,
        max_sequences=min(max_sequences, tokens * count),
        micro_batches=count,
        micro_batch_tokens=tokens,
        spread=on_gpu or config.micro_batches is not None,
        region_bytes=region,
        attention_workers=workers,
        attention_threads=threads,
        compute_threads=config.compute_threads or (min(4, machine.num_cpus) if on_gpu else machine.num_cpus),
        loader_threads=config.loader_threads or 4,
        attention_cpus=config.attention_cpus or ((),) * workers,
        compute_cpus=config.compute_cpus or (),
        loader_cpus=config.loader_cpus or (),
        parts={**fixed, "layers": layer_bytes, "KV cache": num_pages * page},
    )


def spread_evenly(count: int, total: int) -> tuple[int, ...]:
    """`count` of the numbers 0 .. total - 1, as far apart as they can be, so that a reader never meets a long run of
    the others."""
    return tuple(sorted({(2 * i + 1) * total // (2 * count) for i in range(count)})) if count else ()


def _shapes(config: EngineConfig, on_gpu: bool) -> list[tuple[int, int]]:
    """(tokens of a micro-batch, micro-batches), the most wanted first."""
    shapes = []
    for tokens, count in SHAPES:
        shape = (config.micro_batch_tokens or tokens, config.micro_batches or (max(count, 4) if on_gpu else count))
        if shape not in shapes:
            shapes.append(shape)
    return shapes


def num_attention_workers(config: EngineConfig, machine: Machine) -> int:
    """One per NUMA node, so that each works on memory of its own; known before the model is."""
    if config.attention_workers is not None:
        return config.attention_workers
    return len(config.attention_cpus) if config.attention_cpus else min(machine.numa_nodes, machine.num_cpus)


def _attention_threads(config: EngineConfig, machine: Machine, workers: int, on_gpu: bool) -> int:
    """On a CPU device the passes of one micro-batch take turns with the products, so attention may use every core;
    beside a GPU two cores are left to the other processes."""
    cores = max(1, machine.num_cpus - 2) if on_gpu else machine.num_cpus
    return config.attention_threads or max(1, cores // workers)


def _workspace_bytes(spec: ModelSpec, tokens: int, count: int, max_sequences: int) -> int:
    """Temporaries of the compute worker: one running micro-batch, the suspended ones, logits and attention scores."""
    item = ITEM_BYTES[spec.dtype]
    width = max(layer.exchange_width for layer in spec.attention)
    heads = max(layer.num_heads for layer in spec.attention)
    running = tokens * item * (3 * spec.intermediate_size + 6 * spec.hidden_size + width)
    suspended = (count - 1) * tokens * item * (3 * spec.hidden_size + width)
    logits = min(max_sequences, tokens) * spec.vocab_size * 4 * 2
    scores = heads * 128 * min(tokens, spec.max_length) * 4 * 2
    return int((running + suspended + max(logits, scores)) * ALLOCATOR_SLACK)


def _device_slots(
    spec: ModelSpec, staged: bool, on_gpu: bool, gpu: int, layer_slot: int, outside: int, work: int
) -> int:
    """Layer slots on the device: all layers if the budget allows, else as many as fit, at least two."""
    if not staged:
        return 0
    if not on_gpu:
        return min(3, spec.num_layers)
    context = 600 * MIB  # CUDA context and libraries
    fitting = (gpu - outside - work - context) // layer_slot
    least = min(2, spec.num_layers)
    if fitting < least:
        needed = outside + work + context + least * layer_slot
        raise PlanError(
            f"{spec.class_name} needs at least {format_size(needed)} of GPU memory, {format_size(gpu)} allowed: "
            "raise gpu, or lower micro_batch_tokens"
        )
    return min(fitting, spec.num_layers)


def describe(plan: Plan, spec: ModelSpec) -> str:
    """The plan for people."""
    layers = f"{len(plan.resident_layers)} of {spec.num_layers} layers in RAM"
    if plan.layer_slots:
        layers += f", {spec.num_layers - len(plan.resident_layers)} streamed through {plan.layer_slots} slots"
    lines = [
        f"model     {spec.class_name}, {spec.num_parameters / 1e6:,.1f} M parameters, {spec.dtype}, "
        f"{spec.num_layers} layers, sequences up to {spec.max_length} tokens",
        f"weights   {layers}" + (f", {plan.device_slots} device slots" if plan.staged else ""),
        f"KV cache  {plan.kv_tokens:,} tokens in {plan.num_pages:,} pages of {plan.page_tokens}",
        f"block     up to {plan.micro_batches} micro-batches of {plan.micro_batch_tokens} tokens, "
        f"{plan.max_sequences} sequences",
        f"workers   1 loader ({plan.loader_threads} reads), {plan.attention_workers} attention "
        f"({plan.attention_threads} threads each), 1 compute ({plan.compute_threads} threads)",
        f"memory    {format_size(plan.planned_bytes)} of {format_size(plan.ram)} RAM: "
        + ", ".join(f"{name} {format_size(size)}" for name, size in plan.parts.items()),
    ]
    return "\n".join([*lines, *(f"warning   {warning}" for warning in spec.warnings)])

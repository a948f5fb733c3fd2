"""Turns budgets into a plan: what is placed where, before anything is allocated. Pure logic.

Everything the engine takes of main memory is in `Plan.parts`; what does not fit is refused with the number that would.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.memory.kv_layout import disk_slot_bytes
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.plan.machine import Machine
from flexgen_lite.plan.need import DEVICE_RING, Measured, Need, Sharing, need_of
from flexgen_lite.plan.placement import Placement, Sizes, leaves_enough, place, place_decided
from flexgen_lite.plan.slots import lay_out
from flexgen_lite.plan.workload import Workload
from flexgen_lite.text.sizes import format_size
from flexgen_lite.wire.arena_specs import KvGroup

MIB = 1 << 20
CUDA_CONTEXT_BYTES = 600 * MIB  # context and libraries on the device: 588 MiB on an H100 with CUDA 13.0
AUTO_RAM_SHARE = 0.85
AUTO_GPU_SHARE = 0.9
HEAD_COPY_SHARE = 0.05  # of the budget, at most
KV_WORTH_TELLING = 0.1  # of what is enough
BLOCK_SHARE = 4  # at most one part in so many of the budget is for temporaries and exchange
STREAMING_BLOCK_SHARE = 12  # where weights are read in every pass, room for sequences is worth more
SHAPES = ((2048, 4), (2048, 2), (1024, 2), (512, 2), (256, 2), (128, 2), (64, 1))  # micro-batch tokens, micro-batches


class PlanError(ValueError):
    """A budget or a setting that cannot be met; names what is needed and what would lower it."""


class RamError(PlanError):
    """`ram` is too small.

    Args:
        who: needs it.
        enough: bytes that would do.
        allowed: bytes.
        remedies: beside more of it: ", or lower this".
    """

    def __init__(self, who: str, enough: int, allowed: int, remedies: str) -> None:
        given = format_size(allowed + 1, floor)  # of "1.2GiB" a part of a byte was cut off
        super().__init__(
            f"{who} needs at least {format_size(enough, ceil)} of RAM, {given} allowed: raise ram{remedies}"
        )
        self.enough, self.remedies = enough, remedies


@dataclass(frozen=True, slots=True)
class Plan:
    """Slots are numbered by `slot_offsets`; the last holds everything outside the layers. How they lie: slots.py."""

    ram: int
    gpu: int
    staged: bool
    resident_layers: tuple[int, ...]
    layer_slots: int  # of the ring, through which the other layers come; 0 where there are none
    slot_offsets: tuple[int, ...]
    projection_layers: tuple[int, ...]  # whose projections are computed on the CPU and stay in RAM
    projection_offsets: tuple[int, ...]  # of the slots for these
    layer_slot_bytes: int  # on the device
    weights_bytes: int
    device_slots: int
    device_layers: tuple[int, ...]  # that stay in the first device slots; the others come through the rest of them
    device_alone: tuple[int, ...]  # of those, the ones that have no place in RAM: they come through its ring once
    copy_head: bool  # the products use a copy of the tied head in an order that suits them
    num_pages: int
    kv_dtype: str
    kv_groups: tuple[KvGroup, ...]
    max_sequences: int
    state_places: int  # two for each of them, where the model has states
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
    warnings: tuple[str, ...]
    kv_disk: int = 0  # bytes on disk, for KV of sequences that wait and of beginnings of prompts
    shared_bytes: int = 0  # of the weights, from the first on, that all engines of the machine map; 0: there is but one

    @property
    def planned_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def shares(self) -> bool:
        """Weights with other engines."""
        return self.shared_bytes > 0

    @property
    def process_bytes(self) -> dict[str, int]:
        """What each process may take of the parts, by its name; what it maps of the arenas is not its own."""
        own = ("compute worker", "workspace", "products", "head copy", "device slots")
        share = self.parts["attention workers"] // self.attention_workers
        return {
            "coordinator": self.parts["coordinator"],
            "disk loader": self.parts["loader"],
            "zygote": self.parts["zygote"],
            "compute worker": sum(self.parts.get(name, 0) for name in own),
            **{f"attention worker {index}": share for index in range(self.attention_workers)},
        }

    def ring_layers(self, num_layers: int) -> tuple[int, ...]:
        """Those that come through the ring, in every pass or once."""
        return tuple(layer for layer in range(num_layers) if layer not in set(self.resident_layers))


def auto_ram(machine: Machine) -> int:
    return int(machine.available_ram * AUTO_RAM_SHARE)


def make_plan(
    config: EngineConfig,
    spec: ModelSpec,
    machine: Machine,
    processes: Measured,
    on_gpu: bool,
    gpu_total: int,
    expected: Workload | None = None,
    sharing: Sharing | None = None,
) -> Plan:
    """Raises PlanError where the budget does not hold even the smallest plan.

    Args:
        processes: what they take at the start.
        gpu_total: memory of the GPU, 0 where there is none.
        expected: the work to come, where it is known.
        sharing: with other engines (shared.py), whose part of the weights is in the budget as a whole.
    """
    ram = config.ram or auto_ram(machine)
    _check_cpus(config, machine)
    need = need_of(config, spec, machine, processes, on_gpu, expected, sharing)
    _check_kv_disk(need)
    tokens, count, slots = _choose_block(need, ram)
    fixed = need.fixed(tokens, count)
    asked = need.max_sequences
    max_sequences = min(asked, tokens * count)
    if spec.states:
        max_sequences = min(max_sequences, _num_states(need, ram - sum(fixed.values()), tokens, slots))
        fixed = fixed | {"states": max_sequences * need.state_bytes}
        fewer = config.model_copy(update={"max_sequences": max_sequences})  # KV pages are wanted for no more
        need = need_of(fewer, spec, machine, processes, on_gpu, expected, sharing)
    staged = on_gpu if config.stage_weights is None else config.stage_weights
    if on_gpu and not staged:
        raise PlanError("stage_weights=false is not possible on a GPU: its layers are used from device slots")
    gpu = config.gpu or int(gpu_total * AUTO_GPU_SHARE)
    device_slots = _device_slots(need, staged, gpu, fixed["workspace"])
    copy_head = 0 < spec.head_copy_bytes <= ram * HEAD_COPY_SHARE and config.stage_weights is not True
    if copy_head:
        with_copy = fixed | {"head copy": spec.head_copy_bytes}
        placed = _place(need, ram - sum(with_copy.values()), tokens, slots, device_slots)
        copy_head = placed.ring == 0 and placed.num_pages >= need.least_pages
        fixed = with_copy if copy_head else fixed
    placed = _place(need, ram - sum(fixed.values()), tokens, slots, device_slots)
    projections = _on_cpu(need, placed)
    lie = lay_out(need.layers, placed, spec.units[-1].num_bytes, len(projections), sharing is not None)
    apart = len(projections) * need.layers.projections
    threads = _attention_threads(config, machine, need.workers, on_gpu)
    return Plan(
        ram=ram,
        gpu=gpu,
        staged=staged,
        resident_layers=placed.resident,
        layer_slots=placed.ring,
        slot_offsets=lie.offsets,
        projection_layers=projections,
        projection_offsets=lie.projections,
        layer_slot_bytes=need.layers.whole,
        weights_bytes=lie.num_bytes,
        device_slots=device_slots,
        device_layers=placed.on_device,
        device_alone=tuple(layer for layer in placed.on_device if layer not in placed.resident),
        copy_head=copy_head,
        num_pages=placed.num_pages,
        kv_dtype=need.kv_dtype,
        kv_groups=need.kv_groups,
        max_sequences=max_sequences,
        state_places=2 * max_sequences if spec.states else 0,
        micro_batches=count,
        micro_batch_tokens=tokens,
        spread=on_gpu or config.micro_batches is not None,
        region_bytes=fixed["exchange"] // count,
        attention_workers=need.workers,
        attention_threads=threads,
        compute_threads=need.compute_threads,
        loader_threads=config.loader_threads or 4,
        attention_cpus=config.attention_cpus or ((),) * need.workers,
        compute_cpus=config.compute_cpus or (),
        loader_cpus=config.loader_cpus or (),
        parts={
            **fixed,
            "layers": lie.layer_bytes,
            **({"projections": apart} if apart else {}),
            "KV cache": placed.num_pages * need.page,
        },
        warnings=_warnings(config, on_gpu, asked, tokens * count, bool(projections)),
        kv_disk=config.kv_disk or 0,
        shared_bytes=lie.shared_bytes,
    )


def _warnings(
    config: EngineConfig, on_gpu: bool, max_sequences: int, rows: int, has_projections: bool
) -> tuple[str, ...]:
    """Settings that have less effect than their user may think."""
    found = []
    if config.gpu is not None and not on_gpu:
        found.append(f"gpu={format_size(config.gpu)} has no effect: the compute device is the CPU")
    if config.max_sequences is not None and max_sequences > rows:
        found.append(f"max_sequences={max_sequences} is held to {rows}: micro_batches x micro_batch_tokens")
    if config.cpu_projections == "qkv" and not has_projections:
        found.append("cpu_projections=qkv has no effect: no layer that attends is copied to a device in every pass")
    return tuple(found)


def _check_cpus(config: EngineConfig, machine: Machine) -> None:
    named = {"compute_cpus": [config.compute_cpus], "loader_cpus": [config.loader_cpus]}
    for key, groups in (named | {"attention_cpus": list(config.attention_cpus or ())}).items():
        missing = sorted({cpu for group in groups for cpu in group or ()} - set(machine.cpus))
        if missing:
            raise PlanError(f"{key} names CPU {missing[0]}, which is not among those to be had: {machine.cpus_text}")


def _check_kv_disk(need: Need) -> None:
    """Room for less than a short sequence is of no use."""
    disk, least = need.config.kv_disk, 2 * need.least_pages * disk_slot_bytes(need.page) + need.spec.state_bytes
    if disk is not None and disk < least:
        raise PlanError(
            f"kv_disk={format_size(disk, floor)} has no room for the KV of a sequence of this model: give at least "
            f"{format_size(least, ceil)}, or leave it out"
        )


def _choose_block(need: Need, ram: int) -> tuple[int, int, int]:
    """(tokens of a micro-batch, micro-batches, least layer slots): the most wanted that leaves most of the budget to
    weights and KV cache, else the largest that fits at all."""
    config, layers = need.config, need.spec.num_layers
    shapes = []
    for tokens, count in SHAPES:
        shape = config.micro_batch_tokens or tokens, config.micro_batches or (max(count, 4) if need.on_gpu else count)
        if shape not in shapes:
            shapes.append(shape)
    # One is read into while the other is computed with; a third keeps copies to a device going.
    staged = need.on_gpu or config.stage_weights is True
    wanted = (config.layer_slots,) if config.layer_slots else (3, 2) if staged else (2,)
    slot_counts = [min(count, layers) for count in wanted]
    candidates = [(*shape, slots) for slots in slot_counts for shape in shapes]
    fitting = [candidate for candidate in candidates if need.least(*candidate) <= ram]
    if not fitting:
        tokens, count, slots = min(candidates, key=lambda candidate: need.least(*candidate))
        enough = need.least(tokens, count, slots, need.longest_pages(tokens)) + MIB
        raise RamError(
            need.spec.class_name,
            enough,
            ram,
            (f", or lower attention_workers ({need.workers})" if need.workers > 1 else "")
            + (f", micro_batch_tokens ({tokens})" if config.micro_batch_tokens else "")
            + (f", micro_batches ({count})" if config.micro_batches else "")
            + (f", layer_slots ({slots})" if config.layer_slots else "")
            + (", or use dtype bfloat16" if need.spec.dtype == "float32" else "")
            + (", or kv_dtype int8" if _int8_would_help(need, tokens, enough) else "")
            + (", or cpu_projections none" if need.layers.split else ""),
        )
    holding = [candidate for candidate in fitting if need.least(*candidate, need.longest_pages(candidate[0])) <= ram]
    for tokens, count, slots in holding or fitting:
        fixed = need.fixed(tokens, count)
        share = BLOCK_SHARE if need.least(tokens, count, layers) <= ram else STREAMING_BLOCK_SHARE
        if fixed["workspace"] + fixed["exchange"] <= ram // share:
            return tokens, count, slots
    return fitting[-1]


def _num_states(need: Need, available: int, tokens: int, slots: int) -> int:
    """Sequences whose states there is room for beside weights and KV cache: all layers, where they are no more than
    three quarters of it; else what streams them, for a pass takes as long whatever rides on it."""
    layers, ring = need.spec.num_layers * need.layers.whole, need.least_weights(slots)
    each = need.state_bytes + need.wanted_pages * need.page // need.max_sequences
    weights = layers if leaves_enough(layers, available, need.engines) else ring
    longest = need.longest_pages(tokens) * need.page
    return max(1, (available - weights - longest) // each)


def _int8_would_help(need: Need, tokens: int, enough: int) -> bool:
    """Whether KV in 8 bits would lower what is enough by much."""
    return need.kv_dtype != "int8" and need.longest_pages(tokens) * need.page > enough * KV_WORTH_TELLING


def _place(need: Need, available: int, tokens: int, slots: int, device_slots: int) -> Placement:
    """What the budget leaves to weights and KV cache, shared out."""
    layers, forced = need.spec.num_layers, need.config.layer_slots
    longest_pages = need.longest_pages(tokens)
    most_pages = max(need.most_pages, longest_pages)  # a prompt's rows have pages before its window passes them
    pages = need.least_pages, longest_pages, need.wanted_pages, most_pages
    sizes = Sizes(layers, need.layers, need.page, *pages, need.engines)
    staying = layers if device_slots >= layers else max(0, device_slots - DEVICE_RING)
    if need.sharing is not None and need.sharing.resident is not None:
        return place_decided(sizes, available, slots, need.sharing.resident, staying)
    return place(sizes, available, slots, forced is not None and forced < layers, staying)


def _on_cpu(need: Need, placed: Placement) -> tuple[int, ...]:
    """Layers whose projections are computed on the CPU."""
    return tuple(layer for layer in need.layers.split if layer not in placed.on_device)


def _attention_threads(config: EngineConfig, machine: Machine, workers: int, on_gpu: bool) -> int:
    """On a CPU device the passes of one micro-batch take turns with the products, so attention may use every core;
    beside a GPU two cores are left to the other processes."""
    cores = max(1, machine.num_threads - 2) if on_gpu else machine.num_threads
    return config.attention_threads or max(1, cores // workers)


def _device_slots(need: Need, staged: bool, gpu: int, work: int) -> int:
    """Layer slots on the device: all layers if the budget allows, else as many as fit, at least two."""
    layers, outside = need.spec.num_layers, need.spec.units[-1].num_bytes
    if not staged:
        return 0
    if not need.on_gpu:
        return min(need.config.device_slots or DEVICE_RING, layers)
    fitting = (gpu - outside - work - CUDA_CONTEXT_BYTES) // need.layers.whole
    least = min(2, layers)
    if fitting < least:
        needed = outside + work + CUDA_CONTEXT_BYTES + least * need.layers.whole
        raise PlanError(
            f"{need.spec.class_name} needs at least {format_size(needed, ceil)} of GPU memory, "
            f"{format_size(gpu, floor)} allowed: raise gpu, or lower micro_batch_tokens"
        )
    return min(need.config.device_slots or fitting, fitting, layers)

"""The plan as people read it."""

from __future__ import annotations

from collections.abc import Sequence

from flexgen_lite.memory.kv_groups import pages_for
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.plan.plan import Plan
from flexgen_lite.text.sizes import format_size

LENGTHS = (1024, 8192, 65536)  # tokens of sequences that are told of


def describe(plan: Plan, spec: ModelSpec) -> str:
    """The plan for people."""
    streamed = spec.num_layers - len(plan.resident_layers) - len(plan.device_alone)
    layers = f"{len(plan.resident_layers)} of {spec.num_layers} layers in RAM"
    if plan.device_alone:
        layers += f", {len(plan.device_alone)} on the device alone"
    elif plan.staged:
        layers += f", {len(plan.device_layers)} also on the device"
    if streamed:
        layers += f", {streamed} streamed through {plan.layer_slots} slots"
    if plan.staged and (ring := plan.device_slots - len(plan.device_layers)):
        layers += f", those that are not on the device through {ring} slots there"
    if plan.projection_layers:
        apart = format_size(plan.parts["projections"])
        layers += f"; projections of {len(plan.projection_layers)} layers on the CPU, {apart} that stay in RAM"
    if packed := {tensor.packing for unit in spec.units for tensor in unit.tensors if tensor.packing is not None}:
        kinds = sorted({f"{packing.bits} bits with groups of {packing.group}" for packing in packed})
        layers += f"; {format_size(spec.weight_bytes)} with {', '.join(kinds)}"
    lines = [
        f"model     {spec.class_name}, {spec.num_parameters / 1e6:,.1f} M parameters, {spec.dtype}, "
        f"{spec.num_layers} layers, sequences up to {spec.max_length} tokens",
        f"weights   {layers}",
        f"KV cache  {_kv_cache(plan, spec)}",
        *([f"disk      {format_size(plan.kv_disk)} for KV of sequences that wait"] if plan.kv_disk else []),
        *([f"states    {format_size(spec.state_bytes)} a sequence, twice"] if spec.states else []),
        f"block     up to {plan.micro_batches} micro-batches of {plan.micro_batch_tokens} tokens, "
        f"{plan.max_sequences} sequences",
        f"workers   1 loader ({plan.loader_threads} reads), {plan.attention_workers} attention "
        f"({plan.attention_threads} threads each), 1 compute ({plan.compute_threads} threads)",
        f"memory    {format_size(plan.planned_bytes)} of {format_size(plan.ram)} RAM: "
        + ", ".join(f"{name} {format_size(size)}" for name, size in plan.parts.items()),
        *([f"shared    {format_size(plan.shared_bytes)} of that are there once, for all engines"] * plan.shares),
    ]
    return "\n".join(lines)


def describe_engines(plans: Sequence[Plan], cpus: Sequence[int], spec: ModelSpec) -> str:
    """The plans of all engines of a machine: the first one's, and what they have. `cpus`: how many each."""
    own = [plan.planned_bytes - plan.shared_bytes for plan in plans]
    least, most = format_size(min(own)), format_size(max(own))
    memory = most if least == most else f"{least} to {most}"
    few, many = min(cpus), max(cpus)
    number = f"{many} CPU{'s' * (many > 1)}" if few == many else f"{few} to {many} CPUs"
    line = f"engines   {len(plans)}, each with {number} and {memory} of its own"
    if plans[0].shares:
        line += f"; {format_size(plans[0].shared_bytes)} of weights are there once"
    return f"{describe(plans[0], spec)}\n{line}"


def _kv_cache(plan: Plan, spec: ModelSpec) -> str:
    """Tokens that it holds; where they depend on the length of a sequence, what sequences take."""
    kind = f" in {plan.kv_dtype}" if plan.kv_dtype != spec.dtype else ""
    first, *others = plan.kv_groups
    if not others and not (first.window or first.attention_chunk):
        tokens = plan.num_pages * first.page_tokens
        return f"{tokens:,} tokens in {plan.num_pages:,} pages of {first.page_tokens}{kind}"
    size = plan.parts["KV cache"] // plan.num_pages
    lengths = [length for length in LENGTHS if length <= spec.max_length] or [spec.max_length]
    sequences = (f"{format_size(pages_for(plan.kv_groups, n) * size)} with {n:,} tokens" for n in lengths)
    return f"{plan.num_pages:,} pages of {format_size(size)}{kind}; a sequence takes {', '.join(sequences)}"

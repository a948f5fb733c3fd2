"""The memory plan keeps its promise: inside the budget whatever the sizes, or a refusal with a number that does."""

from __future__ import annotations

import contextlib
import re
from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.memory.projection_units import units_of
from flexgen_lite.model.spec import AttentionSpec, ModelSpec, StateSpec, TensorSpec, UnitSpec
from flexgen_lite.plan.machine import Machine
from flexgen_lite.plan.need import MODEST_LENGTH, Measured
from flexgen_lite.plan.plan import SHAPES, Plan, PlanError, RamError, make_plan
from flexgen_lite.plan.text import describe
from flexgen_lite.plan.workload import Workload
from flexgen_lite.queue.page_table import PageTable
from flexgen_lite.text.sizes import parse_size

MIB, GIB = 1 << 20, 1 << 30
MEASURED = Measured(350 * (1 << 20), 30 * (1 << 20), 60 * (1 << 20))
MACHINE = Machine(cpus=(0, 1), available_ram=16 * GIB, numa_nodes=1)


def model(
    layers: int,
    layer_bytes: int,
    outside: int,
    hidden: int,
    max_length: int,
    window: int | None = None,
    state_items: int = 0,
) -> ModelSpec:
    """Every sixth layer sees everything, the others have the window; or a state of so many items of float32."""
    apart = layer_bytes // 4
    units = tuple(
        UnitSpec(f"layer {i}", _tensors(apart, layer_bytes - apart), (), (), layer_bytes) for i in range(layers)
    )
    attention = [
        AttentionSpec(hidden // 64, hidden // 64, 64, 64, 0.125, None if i % 6 == 5 else window, None, False)
        for i in range(layers)
    ]
    kept = [i for i in range(layers) if i % 6 < 5] if state_items else []
    size = -(-4 * state_items // 64) * 64
    return ModelSpec(
        model_type="opt", class_name="OPTForCausalLM", dtype="float32", num_layers=layers, vocab_size=50000,
        hidden_size=hidden, intermediate_size=4 * hidden, max_length=max_length, eos_token_ids=(2,), bos_token_id=1,
        num_parameters=1, files=(), stamps=(), units=(*units, UnitSpec("outside", (), (), (), outside)),
        columns=tuple(range(layers)),
        attention=tuple(attention),
        kv_columns=tuple(layers - 1 if i in kept else i for i in range(layers)),
        stops=tuple(kept),
        projections=tuple(() if i in kept else (0,) for i in range(layers)),
        states=tuple(StateSpec("recurrent", i, 0, (state_items,), "float32", n * size) for n, i in enumerate(kept)),
    )  # fmt: skip


def _tensors(*sizes: int) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(f"t{n}", "uint8", (size,), 0, size, ()) for n, size in enumerate(sizes))


def plan_for(spec: ModelSpec, expected: Workload | None = None, **options: object) -> Plan:
    config = EngineConfig(model="m", **options)
    return make_plan(config, spec, MACHINE, MEASURED, on_gpu=False, gpu_total=0, expected=expected)


def gpu_plan_for(spec: ModelSpec, **options: object) -> Plan:
    config = EngineConfig(model="m", **options)
    return make_plan(config, spec, MACHINE, MEASURED, on_gpu=True, gpu_total=80 * GIB)


SPECS = st.builds(
    model,
    layers=st.integers(1, 40),
    layer_bytes=st.integers(1, 200_000).map(lambda pages: pages * 4096),
    outside=st.integers(1, 100_000).map(lambda pages: pages * 4096),
    hidden=st.integers(1, 64).map(lambda heads: heads * 64),
    max_length=st.integers(1, 8192),
    window=st.none() | st.integers(1, 2048),
    state_items=st.just(0) | st.integers(1, 2_000_000),
)
OPTIONS = st.fixed_dictionaries(
    {"ram": st.integers(700, 16_000).map(lambda mib: mib * MIB)},
    optional={
        "attention_workers": st.integers(1, 6),
        "max_sequences": st.integers(1, 1000),
        "micro_batches": st.integers(1, 6),
        "micro_batch_tokens": st.integers(1, 4096),
        "layer_slots": st.integers(2, 8),
        "page_tokens": st.sampled_from([16, 32, 64]),
        "kv_dtype": st.sampled_from(["auto", "int8"]),
        "stage_weights": st.booleans(),
        "device_slots": st.integers(2, 12),
        "cpu_projections": st.sampled_from(["none", "qkv"]),
    },
)


EXPECTED = st.none() | st.builds(
    lambda sequences, typical, more: Workload(sequences, typical, typical + more // 2, typical + more),
    st.integers(1, 5000),
    st.integers(1, 3000),
    st.integers(0, 3000),
)


@given(SPECS, EXPECTED, OPTIONS)
def test_a_plan_stays_inside_the_budget_and_hangs_together(
    spec: ModelSpec, expected: Workload | None, options: dict[str, object]
) -> None:
    try:
        made = plan_for(spec, expected, **options)
    except PlanError:
        assume(False)
    assert made.planned_bytes <= made.ram == options["ram"]
    assert len(made.resident_layers) + len(made.ring_layers(spec.num_layers)) == spec.num_layers
    streamed = spec.num_layers - len(made.resident_layers)
    assert (made.layer_slots == 0) == (streamed == 0)
    assert made.layer_slots >= min(2, streamed)
    on_device = set(made.device_layers)
    assert set(made.device_alone) == on_device - set(made.resident_layers)
    passing = spec.num_layers - len(on_device)
    assert made.device_slots == 0 or made.device_slots >= len(on_device) + min(2, passing)
    units = units_of(spec, made.projection_layers)
    needed = [units[layer].num_bytes for layer in made.resident_layers]
    starts = (*made.slot_offsets, *made.projection_offsets, made.weights_bytes)
    sizes = [end - start for start, end in pairwise(starts)]
    held = [
        *needed,
        *[max((units[i].num_bytes for i in made.ring_layers(spec.num_layers)), default=0)] * made.layer_slots,
    ]
    assert all(size >= unit.num_bytes for size, unit in zip(sizes[len(held) :], units[spec.num_layers :], strict=True))
    assert all(size >= num_bytes for size, num_bytes in zip(sizes, held, strict=False))
    assert made.parts.get("projections", 0) == sum(sizes[len(held) + 1 :])
    assert set(made.projection_layers).isdisjoint(on_device) and (made.staged or not made.projection_layers)
    if made.staged and options.get("cpu_projections") == "qkv":
        assert set(made.projection_layers) | on_device >= set(range(spec.num_layers)) - set(spec.stops)
    assert made.max_sequences <= made.micro_batches * made.micro_batch_tokens
    assert made.state_places == (2 * made.max_sequences if spec.states else 0)
    assert made.parts.get("states", 0) == made.state_places * spec.state_bytes
    table = PageTable(made.num_pages, made.kv_groups, made.attention_workers)
    assert table.max_tokens(256) >= min(spec.max_length, 256), "a sequence of ordinary length fits on every worker"


@given(SPECS, OPTIONS)
@example(model(3, 266240, 8192, hidden=1088, max_length=1025), {"ram": 700 * MIB, "max_sequences": 1})
def test_a_refusal_names_a_budget_that_does(spec: ModelSpec, options: dict[str, object]) -> None:
    with pytest.raises(PlanError) as refusal:
        plan_for(spec, **{**options, "ram": 400 * MIB})
    match = re.search(r"needs at least ([\d.]+ \w+) of RAM, 400\.0 MiB allowed: raise ram", str(refusal.value))
    assert match, str(refusal.value)
    named = parse_size(match[1].replace(" ", ""))
    named += 64 * MIB if named < 10 * GIB else GIB  # it is rounded for people
    assert most_tokens(plan_for(spec, **{**options, "ram": named})) >= min(spec.max_length, MODEST_LENGTH)


@pytest.mark.parametrize("given", ["1.1 GiB", "1.2 GiB", "3.0 GiB", "700.3 MiB"])
def test_a_refusal_names_the_budget_as_it_was_given(given: str) -> None:
    error = RamError("a model", 9 * GIB, parse_size(given), "")
    assert f"needs at least 9.0 GiB of RAM, {given} allowed" in str(error)


def test_int8_has_room_for_nearly_four_times_what_float32_has() -> None:
    """Of rows of 64 items, with their scales; and where there are not enough pages, it is a remedy."""
    spec = model(4, 4 * MIB, 4 * MIB, hidden=2048, max_length=8192)
    plain, small = (plan_for(spec, ram=3 * GIB, max_sequences=1000, kv_dtype=kv_dtype) for kv_dtype in ("auto", "int8"))
    assert (plain.kv_dtype, small.kv_dtype) == ("float32", "int8")
    assert small.num_pages / plain.num_pages == pytest.approx(256 / 68, rel=0.01)
    assert "in int8" in describe(small, spec) and "in float32" not in describe(plain, spec)
    for kv_dtype in ("auto", "int8"):
        with pytest.raises(PlanError) as refusal:
            plan_for(spec, ram=400 * MIB, kv_dtype=kv_dtype, max_model_len=8192)
        assert ("kv_dtype int8" in str(refusal.value)) == (kv_dtype == "auto")


def most_tokens(made: Plan) -> int:
    """Of one sequence, that each attention worker can hold."""
    return PageTable(made.num_pages, made.kv_groups, made.attention_workers).max_tokens(made.micro_batch_tokens)


@given(SPECS, st.integers(300, 4096), st.integers(700, 6000))
def test_the_longest_row_is_served_where_any_plan_could(spec: ModelSpec, longest: int, ram: int) -> None:
    """Any: of those that other settings make."""
    expected, longest = Workload(1000, 200, longest, longest), min(longest, spec.max_length)
    try:
        made = plan_for(spec, expected, ram=ram * MIB)
    except PlanError:
        assume(False)
    if most_tokens(made) >= longest:
        return
    for tokens, count in SHAPES:
        for streamed in ({}, {"layer_slots": 2}):
            with contextlib.suppress(PlanError):
                other = plan_for(
                    spec, expected, ram=ram * MIB, micro_batch_tokens=tokens, micro_batches=count, **streamed
                )
                assert most_tokens(other) < longest, f"{tokens} x {count}, {streamed}"


def test_what_a_process_may_take_is_in_the_parts() -> None:
    made = plan_for(model(4, MIB, MIB, 64, 2048), ram=4 * GIB, attention_workers=2)
    arenas = ("exchange", "embeddings and head", "layers", "KV cache", "client")
    assert sum(made.process_bytes.values()) == made.planned_bytes - sum(made.parts[name] for name in arenas)
    assert made.process_bytes["attention worker 1"] > MEASURED.attention


def test_states_limit_how_many_sequences_run() -> None:
    """A sequence's two places have 40 MiB each. Layers stay, and pages are no more than those sequences can use."""
    spec = model(12, 100 * MIB, 100 * MIB, 512, 2048, state_items=MIB)
    small, large = plan_for(spec, ram="4GiB"), plan_for(spec, ram="12GiB")
    for made in (small, large):
        assert spec.state_bytes == 40 * MIB and made.resident_layers == tuple(range(12))
        assert made.parts["states"] == made.max_sequences * 80 * MIB
        assert made.num_pages <= made.max_sequences * 2048 // 16
        assert "states    40.0 MiB a sequence, twice" in describe(made, spec)
    assert 10 < small.max_sequences < 40 < 80 < large.max_sequences < 150
    assert plan_for(spec, ram="4GiB", max_sequences=5).max_sequences == 5


def test_where_there_is_no_room_for_a_state_it_is_part_of_what_is_named() -> None:
    """Of one sequence, in two places."""
    least = []
    for items in (1, 64 * MIB):
        with pytest.raises(PlanError) as refusal:
            plan_for(model(12, MIB, MIB, 512, 2048, state_items=items), ram="400MiB")
        match = re.search(r"needs at least ([\d.]+ \w+) of RAM, 400\.0 MiB allowed", str(refusal.value))
        assert match
        least.append(parse_size(match[1].replace(" ", "")))
    assert least[1] - least[0] == pytest.approx(2 * 10 * 256 * MIB, rel=0.03)
    made = plan_for(model(12, MIB, MIB, 512, 2048, state_items=64 * MIB), ram=least[1] + 64 * MIB)
    assert made.max_sequences == 1 and made.state_places == 2


def test_a_model_that_fits_stays_in_memory() -> None:
    made = plan_for(model(24, 100 * MIB, 400 * MIB, 2048, 2048), ram=8 * GIB)
    assert made.resident_layers == tuple(range(24))


def test_a_model_beyond_the_budget_streams_through_slots() -> None:
    made = plan_for(model(24, 200 * MIB, 400 * MIB, 2048, 2048), ram=4 * GIB)
    assert made.layer_slots == 2
    assert made.num_pages > 0


def test_layers_on_a_gpu_keep_a_copy_in_ram_only_where_there_is_room() -> None:
    spec = model(48, 1200 * MIB, 700 * MIB, 7168, 2048)  # OPT-30B
    short, roomy = (gpu_plan_for(spec, ram=ram, gpu="16GiB") for ram in ("80GiB", "800GiB"))
    assert len(short.device_layers) == len(short.device_alone) >= 6
    assert len(short.resident_layers) + len(short.device_alone) == 48, "nothing is read from the disk in a pass"
    assert not set(short.resident_layers) & set(short.device_layers)
    assert short.layer_slots == 3
    assert (roomy.layer_slots, roomy.device_alone, roomy.device_layers) == (0, (), short.device_layers)


def test_a_model_that_fits_the_gpu_leaves_ram_to_the_kv_cache() -> None:
    made = gpu_plan_for(model(32, 400 * MIB, 400 * MIB, 4096, 4096), ram="16GiB", gpu="20GiB")
    assert (made.resident_layers, made.layer_slots) == ((), 3)
    assert made.device_alone == tuple(range(32))
    assert made.parts["KV cache"] > made.ram // 2


def test_few_short_sequences_leave_room_for_layers() -> None:
    spec = model(24, 200 * MIB, 400 * MIB, 2048, 2048)
    unknown, known = plan_for(spec, ram=4 * GIB), plan_for(spec, Workload(20, 150, 200, 300), ram=4 * GIB)
    assert known.max_sequences == 20
    assert len(known.resident_layers) > len(unknown.resident_layers)
    assert most_tokens(known) >= 20 * 150


def test_room_for_the_longest_sequence_expected_comes_before_layers() -> None:
    spec = model(24, 200 * MIB, 400 * MIB, 2048, 2048)
    made = plan_for(spec, Workload(2, 150, 2000, 2000), ram=4 * GIB, attention_workers=2)
    assert most_tokens(made) >= 2000


def test_what_sequences_take_is_said_where_it_depends_on_their_length() -> None:
    plain, windowed = (model(12, MIB, MIB, 1024, 32768, window) for window in (None, 512))
    made = plan_for(plain, ram=4 * GIB)
    assert f"KV cache  {made.num_pages * 16:,} tokens in {made.num_pages:,} pages of 16" in describe(made, plain)
    made = plan_for(windowed, ram=4 * GIB)
    takes = r"a sequence takes [\d.]+ MiB with 1,024 tokens, [\d.]+ MiB with 8,192 tokens\n"
    assert re.search(r"KV cache  [\d,]+ pages of [\d.]+ KiB; " + takes, describe(made, windowed))


def test_a_setting_wins_over_what_is_expected() -> None:
    spec = model(4, MIB, MIB, 64, 2048)
    assert plan_for(spec, Workload(20, 150, 200, 300), ram=4 * GIB, max_sequences=64).max_sequences == 64


@pytest.mark.parametrize(("key", "value"), [("compute_cpus", [0, 7]), ("attention_cpus", [[7]]), ("loader_cpus", [7])])
def test_a_cpu_that_is_not_there_is_named(key: str, value: object) -> None:
    with pytest.raises(PlanError, match=f"{key} names CPU 7, which is not among those to be had: 0, 1"):
        plan_for(model(2, MIB, MIB, 64, 64), ram=4 * GIB, **{key: value})


def test_projections_on_the_cpu_stay_in_ram() -> None:
    """Of layers that do not stay on the device; what these have in RAM besides is smaller by as much."""
    spec = model(48, 1200 * MIB, 700 * MIB, 7168, 2048)  # OPT-30B
    for ram, gpu in (("80GiB", "16GiB"), ("200GiB", "16GiB"), ("40GiB", "16GiB"), ("80GiB", "100GiB")):
        without, made = (gpu_plan_for(spec, ram=ram, gpu=gpu, cpu_projections=chosen) for chosen in ("auto", "qkv"))
        assert without.projection_layers == () == without.projection_offsets and "projections" not in without.parts
        assert made.device_layers == without.device_layers
        assert made.projection_layers == tuple(layer for layer in range(48) if layer not in made.device_layers)
        assert made.parts.get("projections", 0) == len(made.projection_layers) * 300 * MIB
        assert made.planned_bytes <= made.ram
    with pytest.raises(PlanError, match=r"allowed: raise ram, or use dtype bfloat16.*, or cpu_projections none$"):
        gpu_plan_for(spec, ram="16GiB", gpu="16GiB", cpu_projections="qkv")
    sizes = [
        end - start
        for start, end in pairwise(gpu_plan_for(spec, ram="80GiB", gpu="16GiB", cpu_projections="qkv").slot_offsets)
    ]
    assert set(sizes) == {900 * MIB, 1200 * MIB} and sizes.count(1200 * MIB) == 3, (
        "those of the ring are for whole layers"
    )


def test_settings_without_effect_warn() -> None:
    made = plan_for(model(2, MIB, MIB, 64, 64), ram=4 * GIB, gpu="8GiB", max_sequences=100, micro_batch_tokens=8)
    assert "gpu=8.0 GiB has no effect" in made.warnings[0]
    assert "max_sequences=100 is held to" in made.warnings[1]
    made = plan_for(model(2, MIB, MIB, 64, 64), ram=4 * GIB, cpu_projections="qkv")
    assert made.projection_layers == () and "cpu_projections=qkv has no effect" in made.warnings[0]

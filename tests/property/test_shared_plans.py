"""Engines that share weights keep one budget together, and agree on what they share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.memory.arena import LARGE_PAGE
from flexgen_lite.memory.projection_units import units_of
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.plan.machine import Machine
from flexgen_lite.plan.need import Measured
from flexgen_lite.plan.plan import Plan, PlanError, make_plan
from flexgen_lite.plan.shared import IN_FRONT_BYTES, Planner
from flexgen_lite.plan.text import describe, describe_engines
from flexgen_lite.plan.workload import Workload
from flexgen_lite.text.sizes import parse_size
from flexgen_lite.wire.engine_share import SharedWeights
from tests.property.test_plan import EXPECTED, GIB, MEASURED, MIB, OPTIONS, SPECS, model


def machine(cpus: int = 2, nodes: int = 1) -> Machine:
    return Machine(cpus=tuple(range(cpus)), available_ram=16 * GIB, numa_nodes=nodes)


def planner(
    spec: ModelSpec, count: int, ram: int, expected: Workload | None = None, gpu: int = 0, **options: object
) -> Planner:
    config = EngineConfig(model="m", **options)
    return Planner(config, spec, MEASURED, gpu > 0, gpu, expected, count, ram)


def total(plans: Sequence[Plan]) -> int:
    """Bytes of main memory that engines take together."""
    return plans[0].shared_bytes + sum(plan.planned_bytes - plan.shared_bytes for plan in plans)


def check_layout(made: Plan, spec: ModelSpec) -> None:
    """Each unit has room where no other is; what is shared comes first."""
    units = units_of(spec, made.projection_layers)
    ring = [max((units[i].num_bytes for i in made.ring_layers(spec.num_layers)), default=0)] * made.layer_slots
    needed = [*(units[layer].num_bytes for layer in made.resident_layers), *ring]
    needed += [unit.num_bytes for unit in units[spec.num_layers :]]
    starts = made.slot_offsets + made.projection_offsets
    held = sorted(zip(starts, needed, strict=True))
    assert held[0][0] == 0 and made.shared_bytes % LARGE_PAGE == 0 < made.shared_bytes
    for (start, num_bytes), (end, _) in pairwise([*held, (made.weights_bytes, 0)]):
        assert start + num_bytes <= end
        assert (start < made.shared_bytes) == (start + num_bytes <= made.shared_bytes), "on one side"
    shared = {*starts[: len(made.resident_layers)], made.slot_offsets[-1]}
    assert all((start < made.shared_bytes) == (start in shared) for start in starts)


@given(SPECS, EXPECTED, OPTIONS, st.integers(2, 9), st.booleans())
def test_engines_keep_one_budget_and_agree(
    spec: ModelSpec, expected: Workload | None, options: dict[str, object], count: int, on_gpu: bool
) -> None:
    ram = int(str(options.pop("ram"))) * count
    gpu = 24 * GIB if on_gpu else 0
    if on_gpu:
        options.pop("stage_weights", None)
    parts = [machine(2 + number % 2) for number in range(count)]
    try:
        plans = planner(spec, count, ram, expected, gpu, **options).plans(parts)
    except PlanError:
        assume(False)
    assert total(plans) <= ram
    assert Planner.total(plans) == total(plans)
    assert len({(plan.resident_layers, plan.shared_bytes) for plan in plans}) == 1
    assert len({tuple(offset for offset in p.slot_offsets if offset < p.shared_bytes) for p in plans}) == 1
    for made in plans:
        check_layout(made, spec)
        assert made.num_pages > 0 and made.planned_bytes <= made.ram
        streamed = spec.num_layers - len(made.resident_layers)
        assert (made.layer_slots == 0) == (streamed == 0) and made.layer_slots >= min(2, streamed)


@given(SPECS, EXPECTED, OPTIONS)
def test_one_engine_shares_nothing(spec: ModelSpec, expected: Workload | None, options: dict[str, object]) -> None:
    ram = int(str(options.pop("ram")))
    alone = EngineConfig(model="m", ram=ram, **options)
    try:
        made = make_plan(alone, spec, machine(), MEASURED, False, 0, expected)
    except PlanError as refusal:
        with pytest.raises(PlanError, match=re.escape(str(refusal))):
            planner(spec, 1, ram, expected, **options).plans([machine()])
        return
    assert planner(spec, 1, ram, expected, **options).plans([machine()]) == [made]
    assert made.shared_bytes == 0


@given(SPECS, OPTIONS, st.integers(2, 9))
def test_a_refusal_names_a_budget_that_does(spec: ModelSpec, options: dict[str, object], count: int) -> None:
    options.pop("ram")
    with pytest.raises(PlanError) as refusal:
        planner(spec, count, 100 * MIB, **options).plans([machine()] * count)
    pattern = rf"in {count} engines needs at least ([\d.]+ \w+) of RAM, 228\.0 MiB allowed: raise ram, or lower engines"
    match = re.search(pattern, str(refusal.value))
    assert match, str(refusal.value)
    named = parse_size(match[1].replace(" ", "")) - IN_FRONT_BYTES
    named += 64 * MIB if named < 10 * GIB else GIB  # it is rounded for people
    assert total(planner(spec, count, named, **options).plans([machine()] * count)) <= named


def test_weights_that_fit_once_stay() -> None:
    """5 GB of weights, and 14 GiB for three engines: each by itself would have to stream them."""
    spec = model(24, 200 * MIB, 400 * MIB, 2048, 2048)
    plans = planner(spec, 3, 14 * GIB).plans([machine()] * 3)
    assert make_plan(EngineConfig(model="m", ram=14 * GIB // 3), spec, machine(), MEASURED, False, 0).layer_slots == 2
    for made in plans:
        assert made.resident_layers == tuple(range(24)) and made.layer_slots == 0
        assert made.shared_bytes == made.weights_bytes == 24 * 200 * MIB + 400 * MIB
    assert total(plans) > 13 * GIB, "what is left is of use"


def test_layers_stay_as_far_as_there_is_room_once() -> None:
    spec = model(24, 200 * MIB, 400 * MIB, 2048, 2048)
    short = Workload(20, 150, 200, 300)
    few, more = (planner(spec, 3, ram * GIB, short).plans([machine()] * 3)[0] for ram in (10, 12))
    assert 0 < len(few.resident_layers) < len(more.resident_layers) < 24
    alone = make_plan(EngineConfig(model="m", ram=4 * GIB), spec, machine(), MEASURED, False, 0, short)
    assert len(alone.resident_layers) < len(more.resident_layers), "in a third of the budget"


def test_rings_that_take_more_than_all_layers_are_none() -> None:
    """Each of eight engines would have two slots for 12 layers."""
    spec = model(12, 500 * MIB, 100 * MIB, 2048, 2048)
    least = []
    for options in ({}, {"layer_slots": 2}):
        with pytest.raises(PlanError) as refusal:
            planner(spec, 8, GIB, **options).plan(machine(), None)
        match = re.search(r"in 8 engines needs at least ([\d.]+ \w+) of RAM", str(refusal.value))
        assert match
        least.append(parse_size(match[1].replace(" ", "")))
    assert least[1] - least[0] == pytest.approx((8 * 2 - 12) * 500 * MIB, abs=100 * MIB)
    assert planner(spec, 8, least[0] - IN_FRONT_BYTES + 64 * MIB).plan(machine(), None).resident_layers == tuple(
        range(12)
    )


def test_an_engine_with_more_to_hold_does_with_fewer_pages() -> None:
    """It has two attention workers: what it shares stays as the first decided."""
    spec = model(24, 200 * MIB, 400 * MIB, 2048, 2048)
    first, second = planner(spec, 2, 8 * GIB).plans([machine(), machine(8, nodes=2)])
    assert (first.attention_workers, second.attention_workers) == (1, 2)
    assert second.parts["KV cache"] < first.parts["KV cache"]
    assert total([first, second]) <= 8 * GIB


def test_what_does_not_agree_is_refused() -> None:
    spec = model(4, 20 * MIB, 40 * MIB, 2048, 2048)
    with pytest.raises(PlanError, match=r"share \d+ bytes of weights, this one would have \d+"):
        planner(spec, 2, 8 * GIB).plan(machine(), SharedWeights((0, 1, 2, 3), 200 * MIB))
    with pytest.raises(PlanError, match="OPTForCausalLM in 2 engines needs at least"):
        planner(spec, 2, 1 * GIB).plan(machine(), SharedWeights((0, 1, 2, 3), 120 * MIB))


def test_engines_as_people_read_them() -> None:
    spec = model(24, 200 * MIB, 400 * MIB, 2048, 2048)
    plans = planner(spec, 2, 12 * GIB, attention_workers=1).plans([machine(12)] * 2)
    text = describe_engines(plans, [12, 12], spec)
    assert re.search(
        r"\nengines   2, each with 12 CPUs and [\d.]+ GiB of its own; 5.1 GiB of weights are there once$", text
    )
    assert "shared    5.1 GiB of that are there once, for all engines" in describe(plans[1], spec)
    text = describe_engines([plans[0], planner(spec, 2, 6 * GIB).plan(machine(), None)], [3, 1], spec)
    assert "each with 1 to 3 CPUs and " in text
    (alone,) = planner(spec, 1, 8 * GIB).plans([machine()])
    assert "shared " not in describe(alone, spec) and "once" not in describe_engines([alone], [1], spec)


def test_processes_that_take_more_in_another_engine() -> None:
    """As they were measured there: that engine's KV cache is smaller, the budget is kept."""
    spec = model(24, 200 * MIB, 400 * MIB, 2048, 2048)
    first = planner(spec, 2, 12 * GIB).plan(machine(), None)
    larger = Measured(MEASURED.compute + 30 * MIB, MEASURED.coordinator, MEASURED.attention)
    other = Planner(EngineConfig(model="m"), spec, larger, False, 0, None, 2, 12 * GIB)
    second = other.plan(machine(), SharedWeights(first.resident_layers, first.shared_bytes))
    assert second.resident_layers == first.resident_layers == tuple(range(24))
    assert total([first, second]) <= 12 * GIB

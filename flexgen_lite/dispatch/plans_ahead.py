"""The plans of all engines of this machine, without an engine."""

from __future__ import annotations

from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.dispatch.engine_config import own_ram, work_of
from flexgen_lite.engine.calibration import Calibration
from flexgen_lite.plan.engine_parts import engine_parts
from flexgen_lite.plan.machine import inspect_machine
from flexgen_lite.plan.plan import Plan
from flexgen_lite.plan.shared import Planner
from flexgen_lite.plan.text import describe_engines
from flexgen_lite.plan.topology import inspect_topology
from flexgen_lite.plan.workload import Workload


def plans_ahead(config: EngineConfig, calibration: Calibration, expected: Workload | None) -> tuple[list[Plan], str]:
    """The plans, and what people read of them.

    Args:
        config: with the number of engines.
        calibration: of the model, on this machine.
        expected: the work to come for all engines, where it is known.

    Raises:
        PlanError: the budget does not hold all of them.
    """
    count, opened = int(config.engines), calibration.opened
    parts = engine_parts(config, inspect_topology(), count)
    gpu_bytes = opened.device_total_bytes
    planner = Planner(
        config,
        opened.spec,
        calibration.processes,
        gpu_bytes > 0,
        gpu_bytes,
        work_of(expected, count),
        count,
        own_ram(config, inspect_machine()),
    )
    plans = planner.plans([inspect_machine(part.cpus, count) for part in parts])
    return plans, describe_engines(plans, [len(part.cpus) for part in parts], opened.spec)

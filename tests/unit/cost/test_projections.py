"""Passes whose projections are computed on the CPU beside a device: what is measured of them, and what they take."""

from __future__ import annotations

from array import array
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from flexgen_lite.cost.fit import rates_of
from flexgen_lite.cost.kinds import OUTSIDE
from flexgen_lite.cost.measured import BesideLoads, PassShape, PassTimes, Times
from flexgen_lite.cost.pass_work import Work
from flexgen_lite.cost.rates import Rates
from flexgen_lite.memory.projection_units import MOST_PROMPT_ROWS, shares_apart
from flexgen_lite.memory.slot_layout import TensorSource, layout_unit
from flexgen_lite.model.spec import AttentionSpec, ModelSpec, SourcePiece
from flexgen_lite.queue.micro_batch import MicroBatch, Piece
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.wire.sampling import WireParams

LAYERS, KB = 4, 1024
PARAMS = WireParams(
    max_tokens=8, min_tokens=0, temperature=0.0, top_k=0, top_p=1.0, seed=0, stop_token_ids=(), ignore_eos=True,
    skip_special_tokens=True,
)  # fmt: skip
HOST, DEVICE, COPY = 3e-3, 1e-3, 0.5e-3  # of a segment, whatever its rows, and of a layer's projections


def source(name: str, num_bytes: int) -> TensorSource:
    shape = (num_bytes // 2,)
    return TensorSource(name, "bfloat16", shape, (SourcePiece(0, 0, num_bytes, name, "bfloat16", shape),))


def model() -> ModelSpec:
    """A quarter of each layer are projections."""
    units = [layout_unit(f"layer {n}", [source(f"{n}.mlp", 96 * KB), source(f"{n}.q", 32 * KB)]) for n in range(LAYERS)]
    call, columns = AttentionSpec(4, 4, 16, 16, 0.25, None, None, False), tuple(range(LAYERS))
    return ModelSpec(
        model_type="m", class_name="M", dtype="bfloat16", num_layers=LAYERS, vocab_size=10, hidden_size=64,
        intermediate_size=64, max_length=4096, eos_token_ids=(), bos_token_id=None, num_parameters=1, files=("f",),
        stamps=(), units=(*units, layout_unit("outside", [source("head", 8 * KB)])), columns=columns,
        attention=(call,) * LAYERS, kv_columns=columns, projections=((1,),) * LAYERS,
    )  # fmt: skip


def measured(spec: ModelSpec) -> Times:
    passes = []
    for singles, prompts in [(n, ()) for n in (1, 16, 64)] + [(0, (64,) * n) for n in (1, 2, 4, 8)]:
        seconds = DEVICE + COPY if sum(prompts) > MOST_PROMPT_ROWS else HOST
        shape = PassShape("raw", (singles,), 32 if singles else 0, (prompts,) if prompts else ())
        segments = ((seconds,),) * LAYERS + ((1e-4,),)
        passes.append(PassTimes(shape, segments, ((1e-4,),) * LAYERS, 0.0, 1e-4))
    share = {0: 0.25}
    return Times(tuple(passes), BesideLoads((), (), ()), {0: (0.03,)}, {0: 3 * COPY}, (), share)


@pytest.fixture
def rates() -> Rates:
    return rates_of(model(), measured(model()))


def test_both_kinds_of_passes_are_found_and_what_is_copied_is_taken_off(rates: Rates) -> None:
    on_host, on_device = rates.segment(False, (0, 0), on_host=True), rates.segment(False, (0, 0))
    for rows in (1, 16, 64):
        assert on_host.seconds(rows, 0) == pytest.approx(HOST)
    assert on_host.seconds(0, 64) == pytest.approx(HOST)
    for rows in (128, 256, 512):
        assert on_device.seconds(0, rows) == pytest.approx(DEVICE)
        assert on_device.seconds(16, rows) == pytest.approx(DEVICE)
    assert rates.upload == {0: pytest.approx(4 * COPY)}, "of a whole layer"
    assert rates.load == {0: pytest.approx(0.04), OUTSIDE: pytest.approx(0.04 * 8 / 128)}


def test_without_projections_there_is_one_kind() -> None:
    times = replace(measured(model()), projections={})
    found = rates_of(model(), times)
    assert not any(name.startswith("host") for name in found.segments)
    assert found.segment(False, (0, 0), on_host=True) == found.segment(False, (0, 0))
    assert found.upload == {0: pytest.approx(3 * COPY)}


def batch(first: int, singles: int, prompts: tuple[int, ...]) -> MicroBatch:
    made = MicroBatch()
    for number, (length, stored) in enumerate([(33, 32)] * singles + [(n, 0) for n in prompts], start=first):
        request = RunningRequest(number, array("i", [1] * length), length, PARAMS, 0, frozenset())
        request.worker, request.stored = 0, stored
        made.add(Piece(request, length - stored))
    return made


def work(rates: Rates, on_device: tuple[int, ...] = (), layers: tuple[int, ...] = tuple(range(LAYERS))) -> Work:
    plan: Any = SimpleNamespace(
        staged=True, projection_layers=layers, device_layers=on_device, ring_layers=lambda count: tuple(range(count))
    )
    return Work(model(), plan, rates)


def test_few_rows_of_prompts_are_computed_on_the_cpu_and_many_copy_the_projections_once(rates: Rates) -> None:
    of_plan = work(rates)
    few = of_plan.of_pass([batch(0, 16, (40,)), batch(100, 16, (24,))])
    assert [one.segments[0] for one in few] == pytest.approx([HOST, HOST])
    many = of_plan.of_pass([batch(0, 16, (40,)), batch(100, 16, (25,))])
    assert [one.segments[0] for one in many] == pytest.approx([DEVICE + COPY, DEVICE])
    assert many[0].segments[-1] == few[0].segments[-1], "behind the last layer nothing is copied"


def test_layers_that_stay_on_the_device_keep_everything_there(rates: Rates) -> None:
    (found,) = work(rates, (1,), (0, 2, 3)).of_pass([batch(0, 16, ())])
    assert found.segments[:LAYERS] == pytest.approx((HOST, DEVICE, HOST, HOST))
    (found,) = work(rates, (1,), (0, 2, 3)).of_pass([batch(0, 0, (128,))])
    assert found.segments[:LAYERS] == pytest.approx((DEVICE + COPY, DEVICE, DEVICE + COPY, DEVICE + COPY))


def test_projections_are_loaded_by_themselves(rates: Rates) -> None:
    assert shares_apart(model(), (1, 3)) == {1: 0.25, 3: 0.25}
    of_plan = work(rates, (1,), (0, 2, 3))
    assert [of_plan.load(unit) for unit in (0, 1, LAYERS + 1)] == pytest.approx([0.03, 0.04, 0.01])
    assert [of_plan.upload(layer) for layer in (0, 1)] == pytest.approx([3 * COPY, 4 * COPY])

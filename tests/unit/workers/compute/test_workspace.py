"""Large tensors have their places in one region, and leave it; in a process of its own, for it serves for good."""

from __future__ import annotations

import multiprocessing
import platform

import pytest

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="made for x86-64's C++ ABI")

CHECK = """
import random, threading
import torch
from flexgen_lite.workers.compute.workspace import FIELDS, LEAST_BYTES, UNIT, Workspace

SIZE = 4 << 20
before = torch.ones(1 << 18)
workspace = Workspace(SIZE)
assert workspace.install()
begin = int(workspace._state[FIELDS.index("base")])

def is_inside(tensor):
    return begin <= tensor.data_ptr() < begin + SIZE

def used():
    return int(workspace._state[FIELDS.index("used")])
"""


forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["torch"])


def run(body: str, before: str = CHECK) -> None:
    process = forks.Process(target=exec, args=(before + body, {}), daemon=True)
    process.start()
    try:
        process.join(120)
        assert process.exitcode == 0, "its standard error says why"
    finally:
        process.kill()
        process.join()


def test_places_are_given_taken_back_and_given_again() -> None:
    run(
        """
rng, live = random.Random(0), []
for step in range(3000):
    if len(live) > 12 or (live and rng.random() < 0.4):
        tensor, value = live.pop(rng.randrange(len(live)))
        assert tensor[0] == tensor[-1] == value, "another tensor wrote there"
    size = rng.choice([10, LEAST_BYTES // 4 - 1, LEAST_BYTES // 4, LEAST_BYTES // 4 + 1, rng.randrange(60_000)])
    tensor = torch.full((size,), step, dtype=torch.float32)
    if size:
        assert is_inside(tensor) == (4 * size >= LEAST_BYTES) or workspace.misses
        assert tensor.data_ptr() % 64 == 0
        live.append((tensor, step))
del tensor, live
assert used() == 0 and workspace.peak_bytes <= SIZE
whole = torch.empty(SIZE, dtype=torch.uint8)
assert is_inside(whole), "all free places are one again"
"""
    )


def test_what_finds_no_place_comes_from_elsewhere() -> None:
    run(
        """
half, more = torch.zeros(SIZE // 2 + UNIT, dtype=torch.uint8), torch.zeros(SIZE // 2, dtype=torch.uint8)
assert is_inside(half) and not is_inside(more) and workspace.misses == 1
del more, before
more = torch.zeros(SIZE // 4, dtype=torch.uint8)
assert is_inside(more)
"""
    )


def test_products_of_onednn_and_resizing_let_go_of_what_they_took() -> None:
    run(
        """
ops = torch.ops.mkldnn
x, weight = torch.randn(70, 256), torch.randn(512, 256)
packed = ops._reorder_linear_weight(weight)
product = ops._linear_pointwise.default(x, packed, None, "none", [], "")
assert torch.allclose(product, x @ weight.t(), atol=1e-3)
grown = torch.empty(10).resize_(100_000)
assert is_inside(grown)
grown.untyped_storage().resize_(0)
del product, packed, x, weight
assert used() == 0
"""
    )


def test_whoever_waits_for_a_turn_yields() -> None:
    run(
        """
import ctypes, time
from flexgen_lite.workers.compute.workspace import NEXT, NOW, YIELD
yields = []
count = ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: yields.append(1) or 0)
workspace._state[YIELD // 8] = ctypes.cast(count, ctypes.c_void_p).value
workspace._state[NEXT // 8] += 1  # a turn of somebody who has no processor
thread = threading.Thread(target=torch.zeros, args=(LEAST_BYTES,))
thread.start()
while len(yields) < 3: time.sleep(0.01)
workspace._state[NOW // 8] += 1
thread.join(60)
assert not thread.is_alive()
"""
    )


def test_threads_may_take_places_at_once() -> None:
    run(
        """
def work(number):
    for step in range(2000):
        tensor = torch.full((LEAST_BYTES // 8 + number * 100,), number, dtype=torch.int64)
        assert tensor[0] == tensor[-1] == number
threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert used() == 0
"""
    )


def test_a_weight_in_few_bits_is_unpacked_in_what_is_planned_for_it() -> None:
    run(
        """
import torch
from torch import nn
from torch.nn.functional import linear
from flexgen_lite.model.packing import Packing
from flexgen_lite.plan.need import UNPACKING_BYTES
from flexgen_lite.workers.compute.unpacked_weights import PackedBits, multiplied
from flexgen_lite.workers.compute.workspace import Workspace
from flexgen_lite.workers.model.weight_map import packed_weights

shape, packing = (8192, 4096), Packing(4, 32, "int8", "float32", zeros="uint8")
module = nn.Module()
packed_weights(module)["weight"] = torch.zeros(packing.num_bytes(shape), dtype=torch.uint8)
weight = PackedBits(module, "weight", packing, shape, torch.bfloat16)
assert weight.ours() is None
workspace = Workspace(512 << 20)
assert workspace.install()
product = multiplied(linear, torch.ones(4, 4096).bfloat16(), weight, 0, None)
assert product.shape == (4, 8192)
assert 8 << 20 < workspace.peak_bytes <= UNPACKING_BYTES["cpu"], workspace.peak_bytes
""",
        before="",
    )

"""Where the slots of weights lie in the arena. Pure logic.

    alone                resident layers | ring | outside the layers | projections
    with other engines   resident layers | outside the layers | pad || ring | projections

What engines of a machine share comes first then, up to the double line; the rest lies in an arena of each engine's own.
Slots have the same numbers in both: resident layers, ring, outside the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from flexgen_lite.memory.arena import LARGE_PAGE
from flexgen_lite.plan.layer_sizes import LayerSizes
from flexgen_lite.plan.placement import Placement


@dataclass(frozen=True, slots=True)
class Slots:
    """
    Attributes:
        offsets: of resident layers, of the ring, of what is outside the layers.
        projections: offsets of the slots for these.
        num_bytes: of all.
        shared_bytes: of the part that engines share, a multiple of LARGE_PAGE; 0: they share nothing.
        layer_bytes: of the slots for layers.
    """

    offsets: tuple[int, ...]
    projections: tuple[int, ...]
    num_bytes: int
    shared_bytes: int
    layer_bytes: int


def lay_out(sizes: LayerSizes, placed: Placement, outside: int, num_projections: int, shares: bool) -> Slots:
    """Layers that stay on the device too have a place for all of them, others for what goes there in every pass.

    Args:
        outside: bytes of what is outside the layers.
        num_projections: layers whose projections are computed on the CPU.
        shares: other engines map what stays in main memory.
    """
    staying = set(placed.on_device)
    resident = [sizes.whole if layer in staying else sizes.without for layer in placed.resident]
    ring = [sizes.whole] * placed.ring
    shared = shared_bytes(sum(resident) + outside) if shares else 0
    *of_resident, end = accumulate(resident, initial=0)
    *of_ring, behind = accumulate(ring, initial=shared or end)
    of_outside = end if shares else behind
    behind += 0 if shares else outside
    apart = num_projections * sizes.projections
    return Slots(
        (*of_resident, *of_ring, of_outside),
        tuple(range(behind, behind + apart, sizes.projections)) if apart else (),
        behind + apart,
        shared,
        sum(resident) + sum(ring),
    )


def shared_bytes(num_bytes: int) -> int:
    """Of the part that engines share, with so many bytes of weights in it."""
    return -(-num_bytes // LARGE_PAGE) * LARGE_PAGE

"""Shares out what a budget leaves to weights and KV cache: which layers stay where. Pure logic."""

from __future__ import annotations

from dataclasses import dataclass, replace

from flexgen_lite.plan.layer_sizes import LayerSizes


@dataclass(frozen=True, slots=True)
class Sizes:
    num_layers: int
    layers: LayerSizes
    page_bytes: int
    least_pages: int
    longest_pages: int  # for the longest sequence that should be served
    wanted_pages: int  # that weights should leave room for
    most_pages: int  # that can ever be of use
    engines: int = 1  # that have the layers together


@dataclass(frozen=True, slots=True)
class Placement:
    resident: tuple[int, ...]  # layers in RAM for good
    ring: int  # slots in RAM through which the others come
    num_pages: int
    on_device: tuple[int, ...] = ()  # layers that stay there, in RAM as well or not


def place_decided(sizes: Sizes, available: int, slots: int, resident: tuple[int, ...], on_device: int) -> Placement:
    """As `place`, where others have decided which layers are in RAM for good."""
    staying = spread_evenly(on_device, sizes.num_layers)
    ring = slots if len(resident) < sizes.num_layers else 0
    whole = ring + len(set(resident) & set(staying))
    available -= whole * sizes.layers.whole + len(set(resident) - set(staying)) * sizes.layers.without
    available -= sizes.layers.projections * len(set(sizes.layers.split) - set(staying))
    return Placement(resident, ring, min(sizes.most_pages, available // sizes.page_bytes), staying)


def place(sizes: Sizes, available: int, slots: int, all_streamed: bool, on_device: int) -> Placement:
    """Places layers and KV pages in `available` bytes.

    Layers that stay on the device have a copy in RAM only where there is room for all layers and all sequences that
    are wanted: it serves when the compute worker is lost.

    Args:
        slots: of the ring, if there is to be one.
        all_streamed: no layer may stay in RAM.
        on_device: how many layers stay there.
    """
    layers = tuple(range(sizes.num_layers))
    staying = spread_evenly(on_device, len(layers))
    placed = _place_in_ram(sizes, available, slots, all_streamed, layers)
    if staying and (placed.ring or placed.num_pages < sizes.wanted_pages):
        layers = tuple(layer for layer in layers if layer not in set(staying))
        placed = _place_in_ram(sizes, available, slots, all_streamed, layers)
    return replace(placed, on_device=staying)


def _place_in_ram(sizes: Sizes, available: int, slots: int, all_streamed: bool, layers: tuple[int, ...]) -> Placement:
    """Places these layers; there is a ring if there are other ones, or if not all of these find room.

    All of them stay if they leave room for the sequences that are wanted, or enough (leaves_enough); and if they leave
    room for the longest sequence, where there is any way to serve that. Otherwise room for sequences comes first,
    since every pass costs one load of the streamed layers whatever rides on it; layers stay as far as there is room
    beyond that. Projections that are computed on the CPU stay in any case.
    """
    available -= sizes.layers.projections * len(set(sizes.layers.split) & set(layers))
    others = sizes.num_layers - len(layers)
    ring = slots if others else 0
    each, of_ring = sizes.layers.without, sizes.layers.whole  # layers that stay on the device come as a whole
    whole = len(layers) * each + ring * of_ring
    longest = sizes.longest_pages * sizes.page_bytes
    served = whole + longest <= available or slots * of_ring + longest > available
    wanted = sizes.page_bytes * sizes.wanted_pages
    roomy = served and (whole + wanted <= available or leaves_enough(whole, available, sizes.engines))
    resident = layers
    if all_streamed or not roomy or whole + sizes.page_bytes * sizes.least_pages > available:
        ring = slots
        after_ring = available - ring * of_ring
        pages = max(sizes.wanted_pages, sizes.longest_pages if longest <= after_ring else 0)
        spare = (after_ring - min(pages * sizes.page_bytes, after_ring)) // each
        most = len(layers) if others else len(layers) - ring
        chosen = () if all_streamed else spread_evenly(min(spare, most), len(layers))
        resident = tuple(layers[index] for index in chosen)
    left = available - len(resident) * each - ring * of_ring
    return Placement(resident, ring, min(sizes.most_pages, left // sizes.page_bytes))


def leaves_enough(weights: int, available: int, engines: int) -> bool:
    """Whether weights are at most three quarters of what all engines that map them have. `available`: bytes that each
    has, with the weights among them."""
    return weights * 4 <= (engines * available - (engines - 1) * weights) * 3


def spread_evenly(count: int, total: int) -> tuple[int, ...]:
    """`count` of the numbers 0 .. total - 1, as far apart as they can be, so that a reader never meets a long run of
    the others."""
    return tuple(sorted({(2 * i + 1) * total // (2 * count) for i in range(count)})) if count else ()

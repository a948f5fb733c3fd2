"""Mixtures of experts on the CPU: rows sorted by expert once, all experts' products in one call.

Transformers' classes of experts find their forward through an interface, as attention does; `register` puts ours there.
A class keeps the weights of all experts in 3-D parameters and says how they lie
(`is_transposed`, `has_gate`, `has_bias`).

Shapes: T tokens, K experts for each, S = T * K rows, E experts, H hidden, N outputs of the first product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from flexgen_lite.workers.compute import product_onednn, product_weights
from flexgen_lite.workers.compute.product_weights import Weights, weights_in_rows
from flexgen_lite.workers.compute.unpacked_weights import PackedBits, multiplied
from flexgen_lite.workers.model.builder import EXPERTS_NAME
from flexgen_lite.workers.model.quantization import EXPERTS

GROUP_ROWS = 4096
"""Rows of experts that go through both products before the next ones do: what is between these stays in the cache."""
SUM_TOKENS = 256
_Others = tuple[torch.Tensor, ...] | torch.Tensor | PackedBits
"""Weights that our own kernels do not serve, one by one: as oneDNN keeps them, as they lie, in few bits."""


def register() -> None:
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, forward)


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """A 3-D parameter whose weights were put in order where they lie: for our kernels, or one by one for oneDNN."""

    ours: Weights | None
    by_onednn: tuple[torch.Tensor, ...]
    memory: torch.Tensor


def prepare(module: Any) -> None:
    """Has a module of experts compute through oneDNN where our own kernels do not serve it."""
    module._packed_experts = {}


def pack(module: Any, in_order: bool) -> None:
    """Puts experts' weights in order in place, where they fit; the parameter becomes a tensor without data.

    Args:
        in_order: those that can be are, put there by another process.
    """
    for name in EXPERTS:
        weight = module._parameters.get(name)
        packed = None if weight is None else _packed(weight.data, module.is_transposed, in_order)
        if packed is not None:
            module._packed_experts[name] = packed
            module._parameters[name] = nn.Parameter(weight.data.to("meta"), requires_grad=False)


def _packed(weight: torch.Tensor, is_transposed: bool, in_order: bool) -> PackedExperts | None:
    if not weight.is_contiguous():
        return None
    rows_ENK = weight.view(weight.shape[0], weight.shape[2], weight.shape[1]) if is_transposed else weight
    ours = weights_in_rows(rows_ENK)
    if ours is None:
        views = [
            product_onednn.pack_in_place(expert.t() if is_transposed else expert, expert, in_order) for expert in weight
        ]
        found = tuple(view for view in views if view is not None)
        return PackedExperts(None, found, weight) if found else None
    if not product_weights.fills_panels(ours.columns):
        return None
    if is_transposed and not in_order:
        for rows_NK, expert_KN in zip(rows_ENK, weight, strict=True):
            rows_NK.copy_(expert_KN.t().contiguous())
    return PackedExperts(ours.in_panels() if in_order else ours.pack(), (), weight)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of x sorted by expert, and where what becomes of them goes.

    Attributes:
        numbers: which rows of `x` they are; None: all in order.
        counts: expert and number of rows.
        target, target_numbers: where results go, and to which rows of that; None: new memory, in order.
    """

    x: torch.Tensor
    numbers: torch.Tensor | None
    counts: list[tuple[int, int]]
    target: torch.Tensor | None = None
    target_numbers: torch.Tensor | None = None


def forward(module: Any, hidden_TH: torch.Tensor, expert_TK: torch.Tensor, share_TK: torch.Tensor) -> torch.Tensor:
    """What Transformers' `grouped_mm` gives, each row by itself. `share_TK`: the weights of the experts' outputs."""
    if hidden_TH.device.type != "cpu" and not hasattr(module, "_bits"):
        grouped: torch.Tensor = grouped_mm_experts_forward(module, hidden_TH, expert_TK, share_TK)
        return grouped
    tokens, top_k = expert_TK.shape
    counts = torch.bincount(expert_TK.reshape(-1), minlength=module.num_experts)
    order_S = torch.argsort(expert_TK.reshape(-1), stable=True)
    token_S = order_S // top_k
    is_whole = len(counts) == module.num_experts  # else there are rows of no expert, which give nothing
    make = hidden_TH.new_empty if is_whole else hidden_TH.new_zeros
    output_SH = make((tokens * top_k, hidden_TH.shape[-1]))
    hidden_TH = hidden_TH.contiguous()
    first = "gate_up_proj" if module.has_gate else "up_proj"
    for begin, rows in _groups(counts[: module.num_experts].tolist()):
        part = slice(begin, begin + sum(count for _, count in rows))
        inner = _multiply(module, first, _Rows(hidden_TH, token_S[part], rows))
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        _multiply(module, "down_proj", _Rows(inner.contiguous(), None, rows, output_SH, order_S[part]))
    if getattr(module, "has_post_expert_norm", False):  # not in Transformers 5.17
        output_SH = module.post_expert_norm(output_SH)
    return _sum(output_SH.view(tokens, top_k, output_SH.shape[-1]), share_TK).to(hidden_TH.dtype)


def _groups(counts: list[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Experts and numbers of their rows, in groups of some GROUP_ROWS rows, and where each group begins."""
    groups: list[tuple[int, list[tuple[int, int]]]] = []
    begin, size = 0, GROUP_ROWS
    for expert, count in enumerate(counts):
        if not count:
            continue
        if size + count > GROUP_ROWS:
            groups.append((begin, []))
            size = 0
        groups[-1][1].append((expert, count))
        begin, size = begin + count, size + count
    return groups


def _multiply(module: Any, name: str, rows: _Rows) -> torch.Tensor:
    """A product of rows with their experts' weights."""
    bias = module._parameters.get(f"{name}_bias") if module.has_bias else None
    bits: PackedBits | None = getattr(module, "_bits", {}).get(name)
    packed: PackedExperts | None = getattr(module, "_packed_experts", {}).get(name)
    weight = module._parameters[name].data
    others: _Others
    if bits is not None:
        ours, others = bits.ours(), bits
        rows = _in_order(rows, bits)
    elif packed is not None:
        ours, others = packed.ours, packed.by_onednn
    else:
        ours, others = weights_in_rows(weight, module.is_transposed), weight
    if ours is None:
        return _one_by_one(module, others, bias, rows)
    output = rows.target
    if output is None:
        output = rows.x.new_empty((sum(count for _, count in rows.counts), ours.columns))
    parts = product_weights.segments(rows.counts, ours.most_rows)
    ours.multiply_segments(output, rows.x, bias, parts, rows.numbers, rows.target_numbers)
    return output


def _in_order(rows: _Rows, bits: PackedBits) -> _Rows:
    """The rows with their items sorted by group, where those of their experts' weights are."""
    if not bits.packing.is_sorted:
        return rows
    x, begin, parts = rows.x if rows.numbers is None else rows.x[rows.numbers], 0, []
    for expert, count in rows.counts:
        parts.append(bits.in_order(x[begin : begin + count], expert))
        begin += count
    return replace(rows, x=torch.cat(parts), numbers=None)


def _one_by_one(
    module: Any,
    weights: _Others,
    bias: torch.Tensor | None,
    rows: _Rows,
) -> torch.Tensor:
    """The same by oneDNN or PyTorch, expert by expert."""
    multiply = product_onednn.multiply if hasattr(module, "_packed_experts") else linear
    is_turned = module.is_transposed and isinstance(weights, torch.Tensor)
    x = rows.x if rows.numbers is None else rows.x[rows.numbers]
    parts, begin = [], 0
    for expert, count in rows.counts:
        part, bias_N = x[begin : begin + count], None if bias is None else bias[expert]
        if isinstance(weights, PackedBits):
            parts.append(multiplied(multiply, part, weights, expert, bias_N))
        else:
            weight_NK = weights[expert].t().contiguous() if is_turned else weights[expert]
            parts.append(multiply(part, weight_NK, bias_N))
        begin += count
    output = torch.cat(parts)
    if rows.target is None:
        return output
    rows.target[rows.target_numbers] = output
    return rows.target


def _sum(output_TKH: torch.Tensor, share_TK: torch.Tensor) -> torch.Tensor:
    """The sum of each token's outputs, in their order, in float32 at least."""
    tokens, top_k, hidden = output_TKH.shape
    total_TH = output_TKH.new_empty((tokens, hidden))
    for start in range(0, tokens, SUM_TOKENS):
        part = slice(start, start + SUM_TOKENS)
        share = share_TK[part].float()
        sum_TH = output_TKH[part, 0].float() * share[:, :1]
        for k in range(1, top_k):
            sum_TH.addcmul_(output_TKH[part, k].float(), share[:, k : k + 1])
        total_TH[part] = sum_TH
    return total_TH

"""Which weights of a model are kept in 8 or 4 bits, and how."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flexgen_lite.model.packing import Packing, fitting_groups
from flexgen_lite.model.quantization import GROUPS, IGNORED, Quantization
from flexgen_lite.text.shown import shown_text
from flexgen_lite.workers.model.weight_trace import Part
from flexgen_lite.workers.serve import UserError

EXPERTS = ("gate_up_proj", "up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """Whether it keeps the weights of all experts in 3-D parameters, as Transformers' interface for them has it."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "down_proj")


def packings(
    model: PreTrainedModel, wanted: Quantization, read: Set[nn.Module], order: str | None = None
) -> Mapping[str, Packing]:
    """How each weight is packed, by its parameter's name: those of linear layers and experts, but what `wanted`
    ignores, what modules share, and `read`, whose weights are read by others than their own forward.

    Args:
        order: of the values; None: that of what they are multiplied in.

    Raises:
        UserError: groups do not divide a weight's width, an expression is none, or 8 bits are to have zeros.
    """
    if wanted.bits == 8 and wanted.symmetric is False:
        raise UserError("quantization_symmetric=false: weights in 8 bits have no zeros: leave it out, or take int4")
    ignored = _Ignored(wanted.ignore)
    found = {name: weight for name, weight in _weights(model, read).items() if not ignored(name.rpartition(".")[0])}
    if not found:
        raise UserError("no layer of the model can be quantised: leave `quantization` out")
    group = _group(wanted, {name: weight.width for name, weight in found.items()})
    return {
        name: Packing(
            bits=wanted.bits,
            group=group,
            order=order or wanted.activations,
            scale_dtype="bfloat16",
            zeros="uint8" if wanted.has_zeros(weight.of_experts) else "",
            is_transposed=weight.is_transposed,
            rounds_rows=wanted.activations == "int8",
        )
        for name, weight in found.items()
    }


def warnings_of(model: PreTrainedModel, wanted: Quantization) -> list[str]:
    """What `wanted` says that has no effect."""
    layers = [path for path, module in model.named_modules() if is_experts(module) or not any(module.children())]
    idle = [pattern for pattern in _Ignored(wanted.ignore).nothing(layers) if pattern not in IGNORED]
    if not idle:
        return []
    example = next(path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return [
        f"quantization_ignore: no layer is named by {shown_text(', '.join(idle))}: names are like {example}, or its "
        "last part; what stands behind re: is compared from the beginning of the whole name on"
    ]


def holds_bits(model: PreTrainedModel, read: Set[nn.Module]) -> dict[str, bool]:
    """The parameters that can be kept in few bits, and whether the model has each as `[K, N]`. `read` as above."""
    return {name: weight.is_transposed for name, weight in _weights(model, read).items()}


@dataclass(frozen=True, slots=True)
class HeldBits:
    """How weights are kept that are in few bits in the checkpoint.

    Attributes:
        is_transposed: what `holds_bits` says.
        order: of the values.
        rounds_rows: as in Packing.
        other_order: of values that are no whole numbers, or have offsets.
    """

    is_transposed: Mapping[str, bool]
    order: str
    rounds_rows: bool
    other_order: str = "bfloat16"


def stored_packing(name: str, parts: Sequence[Part], held: HeldBits) -> Packing | None:
    """How the parameter `name` is kept that the checkpoint's `parts` fill; None: they are not in few bits, or are
    unpacked while they are loaded, since others than products read the parameter, or they are not all alike.
    """
    stored = [part.stored.bits for part in parts]
    first = next((bits for bits in stored if bits is not None), None)
    if first is None or not first.kind:
        return None
    if name not in held.is_transposed:
        return None
    kinds = {None if bits is None else replace(bits, parts=(), order=b"1" if bits.order else b"") for bits in stored}
    # What is side by side in a weight, as gates are beside what they open, has the same inputs.
    orders = {
        (part.region[0] if len(part.region) > 2 else (), part.stored.bits and part.stored.bits.order) for part in parts
    }
    if len(kinds) > 1 or len(orders) > len({place for place, _ in orders}):
        return None
    order = held.order if first.is_whole else held.other_order
    rounds_rows = held.rounds_rows and first.is_whole
    return Packing(
        first.num_bits,
        first.group,
        order,
        first.scale_dtype,
        first.zeros,
        held.is_transposed[name],
        rounds_rows,
        first.kind,
        bool(first.order),
        "" if order == "int8" and (first.finish == "127" or rounds_rows) else first.finish,  # the loader divides by 127
        first.factors,
        first.factor_group,
        first.divides,
    )


@dataclass(frozen=True, slots=True)
class _Weight:
    shape: torch.Size
    is_transposed: bool
    of_experts: bool

    @property
    def width(self) -> int:
        return self.shape[-2 if self.is_transposed else -1]


def _weights(model: PreTrainedModel, read: Set[nn.Module]) -> dict[str, _Weight]:
    """What may be in few bits, by the parameters' names."""
    readers = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found = {}
    for path, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and module not in read:
            names, is_transposed = ["weight"], type(module) is Conv1D
        elif is_experts(module):
            names, is_transposed = [*EXPERTS], bool(module.is_transposed)
        else:
            continue
        for name in names:
            weight: torch.Tensor | None = module._parameters.get(name)
            if weight is not None and readers[id(weight)] == 1:
                found[f"{path}.{name}"] = _Weight(weight.shape, is_transposed, is_experts(module))
    return found


class _Ignored:
    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns: dict[str, re.Pattern[str] | None] = dict.fromkeys(patterns)
        for pattern in patterns:
            if pattern.startswith("re:"):
                try:
                    self._patterns[pattern] = re.compile(pattern[3:])
                except re.error as error:
                    raise UserError(
                        f"quantization_ignore has {pattern}, which is no regular expression: {error}"
                    ) from None

    def __call__(self, path: str) -> bool:
        return any(self._names(pattern, path) for pattern in self._patterns)

    def nothing(self, paths: Sequence[str]) -> list[str]:
        """Patterns that name none of them."""
        return [pattern for pattern in self._patterns if not any(self._names(pattern, path) for path in paths)]

    def _names(self, pattern: str, path: str) -> bool:
        expression = self._patterns[pattern]
        if expression is None:
            return pattern in (path, path.rpartition(".")[2])
        return expression.match(path) is not None


def _group(wanted: Quantization, widths: Mapping[str, int]) -> int:
    """The size of groups that all widths allow."""
    if wanted.group_size is None:
        fitting = set(fitting_groups(next(iter(widths.values())), GROUPS[wanted.bits]))
        for width in widths.values():
            fitting &= set(fitting_groups(width, GROUPS[wanted.bits]))
        if fitting:
            return max(fitting)
    size = wanted.group_size or GROUPS[wanted.bits]
    for name, width in widths.items():
        if size not in fitting_groups(width, width):
            fits = ", ".join(map(str, fitting_groups(width, max(512, size)))) or "none"
            raise UserError(
                f"quantization_group_size={size} does not divide the {width} inputs of {name}: sizes that do are "
                f"{fits}; or name the layer in quantization_ignore"
            )
    return size

"""What a user asks of a model's weights: bits, groups, which stay as they are, and what they are multiplied in."""

from __future__ import annotations

from dataclasses import dataclass

GROUPS = {8: 128, 4: 32}  # items of K with one scale, where nothing else is asked for
IGNORED = ("lm_head", r"re:.*\.(gate|router|wg|shared_expert_gate)(\..*)?$")
"""Layers that stay in 16 bits: the head, and what chooses experts. In the manner of compressed-tensors: names, or
regular expressions behind "re:"."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """
    Attributes:
        group_size: None: that of GROUPS, or the largest that divides all widths.
        ignore: layers that stay as they are.
        activations: "bfloat16" or "int8": what the weights are multiplied in.
        symmetric: weights of 4 bits have no zeros; None: those of experts have none, for few other programs read them.
    """

    bits: int
    group_size: int | None = None
    ignore: tuple[str, ...] = IGNORED
    activations: str = "bfloat16"
    symmetric: bool | None = None

    def has_zeros(self, of_experts: bool) -> bool:
        """Whether the groups of a weight have zeros."""
        return self.bits == 4 and not (of_experts if self.symmetric is None else self.symmetric)

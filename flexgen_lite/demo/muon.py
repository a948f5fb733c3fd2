"""Muon: momentum whose steps are made orthogonal, for weight matrices.

Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024); the quintic's coefficients
are from there. Computed in float32, so that it is quick on processors without bfloat16 instructions.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalise(matrices_NRC: Tensor) -> Tensor:
    """Return a stack of matrices [N, R, C], R <= C, with their singular values pushed towards 1."""
    a, b, c = QUINTIC
    x_NRC: Tensor = matrices_NRC / (matrices_NRC.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = a * x_NRC + torch.baddbmm(b * gram_NRR, gram_NRR, gram_NRR, alpha=c) @ x_NRC
    return x_NRC


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; matrices of one shape go through the iteration together."""

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever given
        """Take one step. Matrices taller than wide are handled transposed."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    rows, columns = parameter.shape
                    by_shape[min(rows, columns), max(rows, columns)].append(parameter)
            for parameters in by_shape.values():
                self._step_together(parameters, group)

    def _step_together(self, parameters: list[nn.Parameter], group: dict[str, float]) -> None:
        directions = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            gradient = parameter.grad
            assert gradient is not None, "only parameters with a gradient come here"
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            direction = gradient.lerp(state["momentum"], group["momentum"])
            directions.append(direction.mT if direction.shape[0] > direction.shape[1] else direction)
        for parameter, update in zip(parameters, orthogonalise(torch.stack(directions)), strict=True):
            rows, columns = parameter.shape
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            parameter.add_(update.mT if rows > columns else update, alpha=-scale)

"""The numbers of a training run."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how."""

    hidden: int = 192
    layers: int = 8
    ffn: int = 512
    head: int = 32
    steps: int = 1700
    batch: int = 32
    warmup_steps: int = 100
    adam_lr: float = 2e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.01
    prompt_loss_weight: float = 0.05
    seed: int = 0
    threads: int = 2
    validate_every: int = 100
    validation_records: int = 512

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to 1 %."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

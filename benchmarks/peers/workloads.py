"""Prompts as random token ids: how many, how long, how much to generate. The same for every system."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Workload:
    name: str
    num_prompts: int
    shortest: int  # tokens of a prompt; lengths in between are log-uniform
    longest: int
    max_tokens: int
    in_memory_group: bool = False  # held to the shape's budget by a memory cgroup
    common: int = 0  # tokens that all prompts begin with

    @property
    def title(self) -> str:
        length = str(self.longest) if self.shortest == self.longest else f"{self.shortest}..{self.longest}"
        common = f", the first {self.common} of them the same" if self.common else ""
        return f"{self.num_prompts} prompts of {length} tokens{common}, {self.max_tokens} generated"

    def shortened(self) -> Workload:
        """To try the command itself with."""
        shortest, longest = max(4, self.shortest // 16), max(4, self.longest // 16)
        small = {"shortest": shortest, "longest": longest, "common": min(self.common, shortest - 1)}
        return dataclasses.replace(self, num_prompts=4, max_tokens=4, **small)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("A", 16, 512, 512, 32),
        Workload("B", 64, 64, 64, 128),
        Workload("C", 64, 16, 768, 32),
        Workload("D", 32, 128, 128, 16, in_memory_group=True),
        Workload("E", 64, 512, 512, 16, common=448),
    )
}


def prompts(workload: Workload, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Token ids from 4 on: the ones below are special in both families."""
    rng = random.Random(seed)
    lengths = [_length(rng, workload) for _ in range(workload.num_prompts)]
    found = [[rng.randrange(4, vocab_size) for _ in range(n)] for n in lengths]
    return [found[0][: workload.common] + tokens[workload.common :] for tokens in found]


def unequal_work(tokens: Sequence[Sequence[int]], num_prompts: int, max_tokens: int) -> str | None:
    """What is wrong with a system's output, if it did not generate `max_tokens` for each prompt."""
    if len(tokens) != num_prompts:
        return f"{len(tokens)} outputs for {num_prompts} prompts"
    wrong = {i: len(row) for i, row in enumerate(tokens) if len(row) != max_tokens}
    return f"not {max_tokens} tokens for prompts {wrong}" if wrong else None


def agreement(left: Sequence[Sequence[int]], right: Sequence[Sequence[int]]) -> float:
    """Share of generated tokens up to which the outputs of a prompt are the same from their start.

    After the first difference the contexts differ, so later tokens say nothing.
    """
    same = total = 0
    for a, b in zip(left, right, strict=True):
        total += len(a)
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / total


def _length(rng: random.Random, workload: Workload) -> int:
    if workload.shortest == workload.longest:
        return workload.longest
    return round(math.exp(rng.uniform(math.log(workload.shortest), math.log(workload.longest))))

"""What was measured for one workload on one shape."""

from __future__ import annotations

import dataclasses
import statistics

from benchmarks.peers.job import Options
from benchmarks.peers.shapes import Shape
from benchmarks.peers.systems import System
from benchmarks.peers.trial import Outcome
from benchmarks.peers.workloads import Workload, agreement


@dataclasses.dataclass
class Lane:
    """What one system did in a cell."""

    system: System
    tries: list[Outcome] = dataclasses.field(default_factory=list)
    options: Options | None = None  # its best
    rounds: list[Outcome] = dataclasses.field(default_factory=list)
    refusal: str = ""  # why it was not measured

    @property
    def finished(self) -> list[Outcome]:
        return [outcome for outcome in self.rounds if outcome.seconds is not None]

    @property
    def hopeless(self) -> bool:
        return bool(self.rounds) and not self.finished

    @property
    def seconds(self) -> float | None:
        """Median over the rounds."""
        return statistics.median(o.seconds for o in self.finished if o.seconds) if self.finished else None

    @property
    def rate_bound(self) -> float | None:
        """Tokens per second at most, where no run came to its end: of the option that got furthest."""
        bounds = [outcome.rate_bound for outcome in self.rounds + self.tries if outcome.rate_bound is not None]
        return None if self.finished else max(bounds, default=None)

    @property
    def failure(self) -> str:
        """Why there is no median."""
        if self.refusal or self.finished:
            return self.refusal
        failed = [*self.rounds, *self.tries]
        return failed[0].failure if failed else "not run"


@dataclasses.dataclass
class Cell:
    shape: Shape
    workload: Workload
    memory_bytes: int  # of the memory cgroup; 0: none
    lanes: dict[str, Lane]
    reference: list[list[int]] | None = None  # Transformers' tokens, to compare with

    @property
    def total_tokens(self) -> int:
        return self.workload.num_prompts * self.workload.max_tokens

    @property
    def title(self) -> str:
        memory = f", in a memory cgroup of {self.memory_bytes / 2**30:g} GiB" if self.memory_bytes else ""
        return f"{self.workload.name} on {self.shape.name}: {self.workload.title}{memory}"

    def rate(self, system: str) -> float | None:
        """Generated tokens per second."""
        seconds = self.lanes[system].seconds
        return self.total_tokens / seconds if seconds else None

    def ratios(self, peer: str) -> list[float]:
        """Per round: tokens per second of ours over the peer's. Empty where there is no pair."""
        if "ours" not in self.lanes:
            return []
        ours, theirs = self.lanes["ours"].rounds, self.lanes[peer].rounds
        return [b.seconds / a.seconds for a, b in zip(ours, theirs, strict=False) if a.seconds and b.seconds]

    def agreement(self, system: str) -> float | None:
        """Share of the tokens that are the reference's."""
        finished = self.lanes[system].finished
        return agreement(finished[0].tokens, self.reference) if finished and self.reference else None

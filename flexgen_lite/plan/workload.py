"""The work that an engine is planned for, where it is known before the start."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Workload:
    """Numbers of tokens are of a prompt and what may be generated for it.

    Attributes:
        sequences: lines of the file.
        typical_tokens: nine of ten of the first lines stay below that, by estimate.
        longest_likely: of the first lines and the longest, by estimate.
        longest_tokens: no sequence has more, going by the longest line.
    """

    sequences: int
    typical_tokens: int
    longest_likely: int
    longest_tokens: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> Self | None:
        return None if values is None else cls(**values)

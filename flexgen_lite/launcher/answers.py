"""How long answers are expected to be. Pure logic."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Self

from flexgen_lite.cost.job import JobRequest


@dataclass(frozen=True, slots=True)
class AnswerTokens:
    """Tokens of an answer: any number from `low` to `high`, each as likely, but no more than the request allows."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """ "100" or "60-140". Raises ValueError."""
        low, _, high = text.partition("-")
        try:
            found = cls(int(low), int(high or low))
        except ValueError:
            found = cls(0, 0)
        if not 0 < found.low <= found.high:
            raise ValueError(
                f"--answer-tokens {text[:40]}: a number such as 100, or a range such as 60-140, is expected"
            )
        return found

    def of(self, requests: Iterable[JobRequest]) -> Iterator[JobRequest]:
        """The same requests with such answers. Those that are alike are one object: there may be millions."""
        draw = random.Random(0)
        made: dict[JobRequest, JobRequest] = {}
        for one in requests:
            length = min(one.max_tokens, draw.randint(self.low, self.high))
            changed = replace(one, generated=length)
            yield made.setdefault(changed, changed)

    def __str__(self) -> str:
        return f"{self.low:,}" if self.low == self.high else f"{self.low:,} to {self.high:,}"

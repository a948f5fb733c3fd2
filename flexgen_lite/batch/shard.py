"""A part of a batch file's lines, for several machines that share its work."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from flexgen_lite.text.shown import shown

MAX_SHARDS = 1_000_000
_FORM = re.compile(r"(\d{1,7})/(\d{1,7})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Shard:
    """Of `count` parts the one with this number, from 0: lines number, number + count, ..., counted from 0."""

    number: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "NUMBER/COUNT".

        Raises:
            ValueError: it is none.
        """
        form = _FORM.fullmatch(text)
        number, count = map(int, form.groups()) if form else (0, 0)
        if not 1 <= count <= MAX_SHARDS:
            raise ValueError(
                f"--shard {shown(text)} is not allowed: give I/N, such as 0/4, 1/4, 2/4 and 3/4 on four machines"
            )
        if number >= count:
            raise ValueError(
                f"--shard {text}: the shards of {count} are 0/{count} to {count - 1}/{count}, give one of them"
            )
        return cls(number, count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def has(self, line: int) -> bool:
        """Whether the line is of this part; lines are counted from 0."""
        return line % self.count == self.number

    def num_lines(self, of: int) -> int:
        """How many of so many lines are."""
        return max(0, -(-(of - self.number) // self.count))


WHOLE = Shard()

"""The logprobs of a running request, until it ends."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from flexgen_lite.wire.sampling import TokenLogprobs


class KeptLogprobs:
    """A growing list in 8 bytes for each token and each of its most likely ones: objects would take twenty times that.

    Args:
        num_top: most likely tokens of each entry.
    """

    def __init__(self, num_top: int) -> None:
        self._size = num_top + 1
        self._integers = array("i")
        self._values = array("f")

    def append(self, found: TokenLogprobs) -> None:
        self._integers.append(found.rank)
        self._values.append(found.logprob)
        for token, logprob in found.top:
            self._integers.append(token)
            self._values.append(logprob)

    def __len__(self) -> int:
        return len(self._values) // self._size

    def __iter__(self) -> Iterator[TokenLogprobs]:
        return self.between(0, len(self))

    def between(self, first: int, end: int) -> Iterator[TokenLogprobs]:
        """The entries from the `first` up to, and without, the `end`."""
        for at in range(first * self._size, end * self._size, self._size):
            integers, values = self._integers[at : at + self._size], self._values[at : at + self._size]
            yield TokenLogprobs(values[0], integers[0], tuple(zip(integers[1:], values[1:], strict=True)))

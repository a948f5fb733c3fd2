"""Where a text ends because of a string in it, found as its pieces come."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Keeps the end of the text that may be the beginning of a string, and no more of it.

    Args:
        strings: any of them ends the text; none is empty.

    Attributes:
        position: characters of the text that are no part of any string that may still come.
        barrier: a string that ends within so many characters ends nothing.
    """

    __slots__ = ("_held", "_strings", "barrier", "position")

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.position = self.barrier = 0

    @property
    def length(self) -> int:
        """Of the text so far."""
        return self.position + len(self._held)

    def copy(self) -> StopStrings:
        """For a text that goes on otherwise."""
        other = StopStrings(self._strings)
        other._held, other.position, other.barrier = self._held, self.position, self.barrier
        return other

    def find(self, piece: str) -> tuple[int, str] | None:
        """The string that the text has with this next piece, and where it begins: of several the one that begins
        first."""
        text = self._held + piece
        found = []
        for string in self._strings:
            at = text.find(string, max(0, self.barrier - self.position - len(string) + 1))
            if at >= 0:
                found.append((self.position + at, string))
        return min(found, key=lambda place: place[0], default=None)

    def add(self, piece: str) -> None:
        """The text goes on with a piece that completes no string."""
        if not piece:
            return
        text = self._held + piece
        kept = max(_overlap(text, string) for string in self._strings)
        self.position += len(text) - kept
        self._held = text[len(text) - kept :]


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of the text are the beginning of the string, and not all of it. What the text had
    before was no such beginning, so it is short."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)

"""Where a text ends because of a string in it, found as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MARGIN_TOKENS = 8  # that are no text at all


class StopStrings:
    """Args:
    strings: any of them ends the text; none is empty.
    decode: token ids to text.
    min_tokens: a string that ends within so many tokens ends nothing.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str], min_tokens: int = 0) -> None:
        self._strings = strings
        self._decode = decode
        self._min_tokens = min_tokens
        # A token that counts has at least one byte: a character may take several.
        self._tail_tokens = max(len(string.encode(errors="replace")) for string in strings) + MARGIN_TOKENS
        self.found = False

    def afresh(self) -> StopStrings:
        """For another text."""
        return StopStrings(self._strings, self._decode, self._min_tokens)

    def look(self, tokens: Sequence[int], first: int) -> None:
        """Look for a string that the last token has completed, the text being that of the tokens from `first` on."""
        begin = max(first, len(tokens) - self._tail_tokens)
        before = self._length(tokens[begin : first + self._min_tokens])
        tail = self._decode(list(tokens[begin:]))
        self.found = any(_find(tail, string, before) >= 0 for string in self._strings)

    def cut(self, text: str, tokens: Sequence[int], include: bool) -> str:
        """The text of these tokens up to the first of the strings in it, that one included or not; all of it where
        there is none."""
        before = self._length(tokens[: self._min_tokens])
        places = [(at, string) for string in self._strings if (at := _find(text, string, before)) >= 0]
        if not places:
            return text
        at, string = min(places, key=lambda place: place[0])
        return text[: at + len(string) * include]

    def _length(self, tokens: Sequence[int]) -> int:
        return len(self._decode(list(tokens)).rstrip("\ufffd")) if len(tokens) else 0


def _find(text: str, string: str, before: int) -> int:
    """Where the string first is in the text, of those places where it ends behind the first `before` characters."""
    return text.find(string, max(0, before - len(string) + 1))

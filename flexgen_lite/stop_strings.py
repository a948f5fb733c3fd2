"""Where a text ends because of a string in it, found as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MARGIN_TOKENS = 8  # a token may be a part of a character, or no text at all


class StopStrings:
    """Args:
    strings: any of them ends the text; none is empty.
    decode: token ids to text.
    """

    def __init__(self, strings: Sequence[str], decode: Callable[[list[int]], str]) -> None:
        self._strings = strings
        self._decode = decode
        self._tail_tokens = max(map(len, strings)) + MARGIN_TOKENS  # a token that counts has at least one character
        self.found = False

    def afresh(self) -> StopStrings:
        """For another text."""
        return StopStrings(self._strings, self._decode)

    def look(self, tokens: Sequence[int], first: int) -> None:
        """Look for a string that the last token has completed, the text being that of the tokens from `first` on."""
        tail = self._decode(list(tokens[max(first, len(tokens) - self._tail_tokens) :]))
        self.found = any(string in tail for string in self._strings)

    def cut(self, text: str, include: bool) -> str:
        """The text up to the first of the strings in it, that one included or not; all of it where there is none."""
        places = [(text.find(string), string) for string in self._strings if string in text]
        if not places:
            return text
        at, string = min(places, key=lambda place: place[0])
        return text[: at + len(string) * include]

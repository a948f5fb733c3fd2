"""The text of a sequence, told as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what bytes decode to that are no whole character yet
LONGEST = 4  # tokens of a character
PATIENCE = 16  # tokens: of more, what ends with no whole character is told up to the last that is one


class TextStream:
    """Decodes the last tokens only, so that a step costs the same however long the text is.

    Args:
        decode: token ids to text.
        stop: strings that may end the text: what may be the beginning of one is held back.
        begin: where the text begins among the tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str], begin: int) -> None:
        self._decode, self._stop, self._begin = decode, stop, begin
        self._hold = max(map(len, stop), default=1) - 1
        self._from = self._read = begin  # the tokens before the next ones, whose text is known: how those begin
        self._next = begin  # tokens between `read` and it have no text
        self.told = begin  # tokens that the reader knows
        self._held = ""

    def afresh(self) -> TextStream:
        """For another sequence from the same prompt."""
        return TextStream(self._decode, self._stop, self._begin)

    def next(self, tokens: Sequence[int]) -> str:
        """What can be told of the text since the last time."""
        self.told = len(tokens)
        before = list(tokens[self._from : self._read])
        known = self._decode(before)
        waited, end = len(tokens) - self._next > PATIENCE, len(tokens)
        text = self._decode(before + list(tokens[self._next : end]))
        while waited and text.endswith(UNFINISHED) and end > len(tokens) - LONGEST:
            end -= 1
            text = self._decode(before + list(tokens[self._next : end]))
        if len(text) > len(known) and (waited or not text.endswith(UNFINISHED)):
            self._from, self._read, self._next = self._next, end, end
            self._held += text[len(known) :]
        elif waited:
            self._next = end
        ready = len(self._held) - self._hold
        if ready <= 0:
            return ""
        told, self._held = self._held[:ready], self._held[ready:]
        return told

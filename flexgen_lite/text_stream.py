"""The text of a sequence, told as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what bytes decode to that are no whole character yet
PATIENCE = 16  # tokens without a text, more than any character has: they will have none


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
        text = self._decode(before + list(tokens[self._next :]))
        if len(text) > len(known) and not text.endswith(UNFINISHED):
            self._from, self._read, self._next = self._next, len(tokens), len(tokens)
            self._held += text[len(known) :]
        elif known and text == known and len(tokens) - self._next > PATIENCE:
            self._next = len(tokens)
        ready = len(self._held) - self._hold
        if ready <= 0:
            return ""
        told, self._held = self._held[:ready], self._held[ready:]
        return told

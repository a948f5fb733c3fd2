"""The text of a sequence, told as its tokens come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

UNFINISHED = "\ufffd"  # what bytes decode to that are no whole character yet


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
        self._from = self._read = self.told = begin  # told: tokens that the reader knows
        self._held = ""

    def afresh(self) -> TextStream:
        """For another sequence from the same prompt."""
        return TextStream(self._decode, self._stop, self._begin)

    def next(self, tokens: Sequence[int]) -> str:
        """What can be told of the text since the last time."""
        self.told = len(tokens)
        known = self._decode(list(tokens[self._from : self._read]))
        text = self._decode(list(tokens[self._from :]))
        if len(text) > len(known) and not text.endswith(UNFINISHED):
            self._from, self._read = self._read, len(tokens)
            self._held += text[len(known) :]
        end = len(self._held) - self._hold
        if end <= 0:
            return ""
        told, self._held = self._held[:end], self._held[end:]
        return told

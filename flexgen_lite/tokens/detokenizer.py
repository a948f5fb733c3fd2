"""How the text of a sequence grows: what each token adds to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

BROKEN = "\ufffd"  # stands for bytes that are no character, or not yet
CONTEXT_TOKENS = 4
CONTEXT_CHARACTERS = 4
"""A decoding that begins within a character has at most three wrong characters; what comes behind them is right."""
WINDOW_TOKENS = 12  # decoded with the next ones, before the context is cut down again
MOST_TOKENS = 128  # of a context, whose tokens then have hardly any text


class Tokenizer(Protocol):
    """Texts and tokens.

    Attributes:
        is_local: the text of a beginning of the tokens is a beginning of their text, and a token's own text depends on
            few tokens before it.
    """

    is_local: bool

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str: ...

    def has_text(self, token: int, skip_special_tokens: bool) -> bool:
        """Whether decoding does not pass it over."""
        ...

    def is_special(self, token: int) -> bool: ...

    def ends_within_character(self, token_ids: Sequence[int]) -> bool:
        """Whether the last bytes of tokens that all have a text are the beginning of a character."""
        ...

    def token_bytes(self, token: int) -> bytes | None:
        """Of a token that is bytes; None for those that are text."""
        ...


class Detokenizer:
    """The pieces of text that tokens add, each with a decoding of the last tokens only, so that one costs the same
    however long the text is. Together they are the text of all tokens, as far as it goes beyond that of `before`.

    A character comes with its last byte; `finish` tells that a text ends within one. Where the tokenizer is not local,
    nothing is certain before the end: all tokens are decoded, and all text comes with `finish`.

    Args:
        tokenizer: of the tokens.
        skip_special_tokens: they are no text.
        before: tokens whose text is known.

    Attributes:
        length: characters that were told.
        begin: where the text of the token that was fed last begins.
        uncertain: what else the text is so far, where the tokenizer is not local.
    """

    __slots__ = ("_is_open", "_settled", "_skip", "_tokenizer", "_window", "begin", "length", "uncertain")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, before: Sequence[int]) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self.length = self.begin = 0
        self.uncertain = ""
        self._window = self._context(before) if tokenizer.is_local else self._visible(before)
        self._is_open = False  # the text ends within a character
        self._settled = self._measure(self._decode(self._window))  # characters of the window's text that are told

    @property
    def end(self) -> int:
        """Where a token begins that does not go on with the last one's character."""
        return self.length + (len(self.uncertain) or self._is_open)

    def peek(self, token: int) -> str:
        """What feeding the token would tell, and what would be uncertain."""
        if not self._tokenizer.has_text(token, self._skip):
            return self.uncertain
        window = [*self._window, token]
        text = self._decode(window)
        return text[self._settled : len(text) - self._ends_open(window, text)]

    def feed(self, tokens: Sequence[int]) -> str:
        """What the tokens add."""
        fresh = self._visible(tokens)
        if not fresh:
            self.begin = self.length + len(self.uncertain)
            return ""
        self.begin = self.end
        self._window += fresh
        text, was_open, known = self._decode(self._window), self._is_open, self._settled
        if not self._tokenizer.is_local:
            self.uncertain = text[known:]
            return ""
        if was_open and not (text.startswith(BROKEN, known) and len(text) > known + 1):
            self.begin = self.length  # they go on with the character
        self._settled = self._measure(text)
        self.length += self._settled - known
        piece = text[known : self._settled]
        if len(self._window) > WINDOW_TOKENS:
            self._window = self._context(self._window)
            self._settled = self._measure(self._decode(self._window))
        return piece

    def finish(self) -> str:
        """What there is beyond what was told."""
        return self._decode(self._window)[self._settled :]

    def _measure(self, text: str) -> int:
        """Characters of the window's text that stay as they are."""
        self._is_open = self._ends_open(self._window, text)
        return len(text) - self._is_open

    def _ends_open(self, window: list[int], text: str) -> bool:
        return text.endswith(BROKEN) and self._tokenizer.ends_within_character(window)

    def _visible(self, tokens: Iterable[int]) -> list[int]:
        has_text, skip = self._tokenizer.has_text, self._skip
        return [token for token in tokens if has_text(token, skip)]

    def _context(self, tokens: Sequence[int]) -> list[int]:
        """The last tokens, enough of them that what follows is decoded as it is behind all of them: decoders drop
        spaces in front of the first text."""
        context: list[int] = []
        wanted = CONTEXT_TOKENS
        for token in reversed(tokens):
            if len(context) >= wanted:
                if len(self._decode(context[::-1])) >= CONTEXT_CHARACTERS or wanted >= MOST_TOKENS:
                    break
                wanted *= 2
            if self._tokenizer.has_text(token, self._skip):
                context.append(token)
        return context[::-1]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, self._skip)

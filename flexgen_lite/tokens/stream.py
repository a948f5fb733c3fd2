"""The text of an answer as its tokens come: where each begins in it, what ends it, and what can be told of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from flexgen_lite.tokens.detokenizer import Detokenizer, Tokenizer
from flexgen_lite.tokens.stop_strings import StopStrings
from flexgen_lite.wire.sampling import WireParams


class TextStream:
    """Answers, their streams, stop strings and offsets all come from here.

    An answer's text is what the text of the prompt and the answer has behind that of the prompt. A prompt that ends
    within a character ends before it.

    Args:
        tokenizer: None where the model has none: there is no text then.
        params: of the request.
        first: the answer's first token, of the sequence's.

    Attributes:
        found: a stop string has ended the text.
        told: tokens that the reader knows.
    """

    __slots__ = (
        "_detokenizer",
        "_first",
        "_has_grown",
        "_is_over",
        "_offsets",
        "_params",
        "_read",
        "_special",
        "_stops",
        "_text",
        "_tokenizer",
        "_told_characters",
        "found",
        "told",
    )

    def __init__(self, tokenizer: Tokenizer | None, params: WireParams, first: int) -> None:
        self._tokenizer, self._params, self._first = tokenizer, params, first
        self._detokenizer: Detokenizer | None = None  # from the first token on
        self._stops = StopStrings(params.stop) if params.stop else None
        self._special: _SpecialText | None = None
        self._text = ""
        self._offsets: array[int] | None = array("i") if params.logprobs is not None else None
        self._read = self.told = first
        self._told_characters = 0
        self._has_grown = self._is_over = self.found = False

    def afresh(self) -> TextStream:
        """For another answer to the same prompt."""
        return TextStream(self._tokenizer, self._params, self._first)

    @property
    def offsets(self) -> Sequence[int]:
        """Where the text of each token that was read begins; none where logprobs were not asked for. Tokens behind the
        end of the text begin at its end."""
        return self._offsets or ()

    def read(self, tokens: Sequence[int]) -> None:
        """Take in the sequence's new tokens."""
        if len(tokens) == self._read:
            return
        self._has_grown = True
        detokenizer = self._begin(tokens)
        if detokenizer is None and self._offsets is not None:
            self._offsets.extend([0] * (len(tokens) - self._read))
        if detokenizer is None or (self._stops is None and self._offsets is None):
            self._text += "" if detokenizer is None else detokenizer.feed(tokens[self._read :])
            self._read = len(tokens)
        while detokenizer is not None and self._read < len(tokens) and not self.found:
            self._step(detokenizer, tokens)

    def read_end(self, tokens: Sequence[int]) -> None:
        """Take in new tokens, of which the last ends the sequence: it is no part of the text, unless it completes a
        stop string."""
        self.read(tokens[:-1])
        detokenizer = self._begin(tokens)
        begin = 0 if detokenizer is None else detokenizer.end
        if detokenizer is not None and self._stops is not None:
            self._search(detokenizer.peek(tokens[-1]), tokens, len(tokens))
        if self._offsets is not None:
            self._offsets.append(begin)
        self._read = len(tokens)

    def take(self) -> tuple[str, int]:
        """What can be told of the text since the last time, and where the tokens end that can be told with it: all of
        them, unless their offsets are told too and depend on what is held back."""
        ready = max(self._told_characters, self._certain())
        piece, self._told_characters = self._text[self._told_characters : ready], ready
        if self._offsets is None:
            self.told = self._read
        else:
            while self.told < self._read and self._offsets[self.told - self._first] <= ready:
                self.told += 1
        return piece, self.told

    def finish(self) -> str:
        """The whole text: no token follows."""
        if self._detokenizer is not None and self._has_grown and not self._is_over and not self.found:
            rest = self._detokenizer.finish()
            place = self._stops.find(rest) if self._stops is not None and self._counts(self._read) else None
            self._text += rest
            if place is not None:
                self._cut(*place)
        self._is_over = True
        if self._offsets is not None:
            self._offsets = array("i", (min(offset, len(self._text)) for offset in self._offsets))
        return self._text

    # ------------------------------------------------------------------------------------------------ inside

    def _begin(self, tokens: Sequence[int]) -> Detokenizer | None:
        if self._detokenizer is None and self._tokenizer is not None:
            self._detokenizer = Detokenizer(self._tokenizer, self._params.skip_special_tokens, tokens[: self._first])
        return self._detokenizer

    def _step(self, detokenizer: Detokenizer, tokens: Sequence[int]) -> None:
        """Take in one token."""
        token, self._read = tokens[self._read], self._read + 1
        piece = detokenizer.feed((token,))
        if self._offsets is not None:
            self._offsets.append(detokenizer.begin)
        if self._stops is not None:
            self._search(piece + detokenizer.uncertain, tokens, self._read)
            if self.found:
                return
            self._stops.add(piece)
        self._text += piece
        if self._stops is not None and self._read - self._first == self._params.min_tokens:
            self._stops.barrier = self._stops.length + len(detokenizer.uncertain)
            if self._special is not None:
                self._special.set_barrier()

    def _search(self, piece: str, tokens: Sequence[int], count: int) -> None:
        """Look for a string that the last of so many tokens completes, whose text is the piece."""
        assert self._stops is not None and self._tokenizer is not None
        token, counts = tokens[count - 1], self._counts(count)
        places = [self._stops.find(piece)] if counts else []
        if self._special is None and self._params.skip_special_tokens and self._tokenizer.is_special(token):
            self._special = _SpecialText(self._tokenizer, tokens[: count - 1], self._stops)
        if self._special is not None:
            places.append(self._special.find(token, len(self._text), counts))
        found = min((place for place in places if place is not None), key=lambda place: place[0], default=None)
        if found is not None:
            self._text += piece
            self._cut(*found)

    def _counts(self, count: int) -> bool:
        """Whether a string that is complete with so many tokens may end the text."""
        return count - self._first > self._params.min_tokens

    def _cut(self, at: int, string: str) -> None:
        self._text = self._text[:at] + (string if self._params.include_stop_str_in_output else "")
        self.found = True

    def _certain(self) -> int:
        """Characters of the text that no stop string can take away."""
        if self._stops is None or self.found or self._is_over:
            return len(self._text)
        if self._special is None:
            return self._stops.position
        return min(self._stops.position, self._special.certain)


class _SpecialText:
    """The text as it is with special tokens, where they are skipped: only there are stop strings found that have them.

    Args:
        before: the tokens before the first special one.
        stops: of the text so far, which is the same in both.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stops: StopStrings) -> None:
        self._detokenizer = Detokenizer(tokenizer, False, before)
        self._stops = stops.copy()
        self._marks = [(stops.position, stops.position)]  # places in this text, and where they are in the shown one

    def find(self, token: int, shown: int, counts: bool) -> tuple[int, str] | None:
        """Take in a token, before which the shown text has so many characters: the string that it completes, if that
        counts, and where it begins in the shown text."""
        self._marks.append((self._stops.length, shown))
        piece = self._detokenizer.feed((token,))
        place = self._stops.find(piece + self._detokenizer.uncertain) if counts else None
        if place is None:
            self._stops.add(piece)
            while len(self._marks) > 1 and self._marks[1][0] <= self._stops.position:
                del self._marks[0]
            return None
        at, string = place
        return self._shown(at), string

    @property
    def certain(self) -> int:
        """Characters of the shown text that no stop string can take away."""
        return self._shown(self._stops.position)

    def set_barrier(self) -> None:
        """Strings that end by now end nothing."""
        self._stops.barrier = self._stops.length

    def _shown(self, at: int) -> int:
        """A place in this text, in the shown one."""
        limit = None
        for own, shown in reversed(self._marks):
            if own <= at:
                place = shown + at - own
                return place if limit is None else min(place, limit)
            limit = shown
        return self._marks[0][1]

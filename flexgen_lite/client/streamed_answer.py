"""What the reader of a stream has of an answer, also where two engines tell it, one after the other. Pure logic."""

from __future__ import annotations

from array import array
from dataclasses import replace

from flexgen_lite.wire.client_messages import RequestDelta, WireOutput

OTHERWISE = (
    "the engine was lost when a part of the answer had been told, and another engine came to a different answer: "
    "ask again"
)


class StreamedAnswer:
    """An engine tells an answer from its beginning. Where one follows another that was lost in the middle, what the
    reader has is passed over; and has to be the same, or the reader would get parts of two answers.

    Attributes:
        characters: that the reader has.
    """

    def __init__(self) -> None:
        self.characters = 0
        self._token_ids = array("i")
        self._again: tuple[int, int] | None = None  # characters and tokens that the next engine has told by now
        self._differs = False

    @property
    def num_tokens(self) -> int:
        """That the reader has."""
        return len(self._token_ids)

    def tell_again(self) -> None:
        """The engine is lost: another one tells from the beginning."""
        self._again = 0, 0

    def rest_of(self, delta: RequestDelta) -> RequestDelta | None:
        """What is new to the reader; None where nothing is."""
        if self._again is not None:
            characters, tokens = self._again
            self._again = characters + len(delta.text), tokens + len(delta.token_ids)
            known = min(len(delta.token_ids), max(0, self.num_tokens - tokens))
            self._differs |= delta.token_ids[:known] != tuple(self._token_ids[tokens : tokens + known])
            text = delta.text[max(0, self.characters - characters) :]
            if self._differs or not (text or delta.token_ids[known:]):
                return None
            delta = replace(
                delta,
                text=text,
                token_ids=delta.token_ids[known:],
                logprobs=delta.logprobs[known:],
                offsets=delta.offsets[known:],
            )
        self.characters += len(delta.text)
        self._token_ids.extend(delta.token_ids)
        return delta

    def agrees_with(self, output: WireOutput) -> bool:
        """Whether the whole answer begins with what the reader has; one that was cancelled may not have come as far."""
        if self._again is None:
            return True
        last = len(output.token_ids) if output.finish_reason == "cancelled" else self.num_tokens
        return not self._differs and output.token_ids[: self.num_tokens] == tuple(self._token_ids[:last])

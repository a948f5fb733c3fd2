"""Answers that end where those of the harness' own `hf` model end, with batches of one.

`hf` looks for a stop string in the last few tokens' text, in which special tokens are written out; the answer's text
has none of them, and is cut at the first stop string in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.models.utils import postprocess_generated_text

from flexgen_lite.client.completion import Completion
from flexgen_lite.client.request import Request
from flexgen_lite.client.sampling_params import SamplingParams
from flexgen_lite.lm_eval.generation_options import GenerationOptions
from flexgen_lite.wire.sampling import MAX_STOP_CHARACTERS, MAX_STOPS

BROKEN = "\ufffd"
LOOK_BACK = 2
"""Tokens that `hf` looks back further than the stop string's own tokens: a model may cut it otherwise."""


class StopStrings:
    """Args:
    strings: any of them ends an answer; an empty one does after the first token.
    tokenizer: of Transformers.
    foreign_to: the model's vocabulary size, if the tokenizer is not its own: the engine then knows no texts.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any, foreign_to: int | None = None) -> None:
        self._tokenizer = tokenizer
        tokens = {string: tokenizer.encode(string, add_special_tokens=False) for string in strings}
        self._widths = {string: len(ids) + LOOK_BACK for string, ids in tokens.items()}
        short = [string for string in self._widths if 0 < len(string) <= MAX_STOP_CHARACTERS]
        self.for_engine = tuple(short[:MAX_STOPS]) if foreign_to is None else ()
        single = [ids[0] for ids in tokens.values() if len(ids) == 1]
        self.single_tokens = tuple(token for token in single if foreign_to is not None and token < foreign_to)

    def end(self, tokens: Sequence[int]) -> int | None:
        """After how many of an answer's tokens it ends; None if none of the strings does."""
        text = self._tokenizer.decode(tokens)
        # bytes that are no character may spoil those beside them, but not in the text of fewer tokens
        there = [(string, width) for string, width in self._widths.items() if string in text or BROKEN in text]
        for count in range(1, len(tokens) + 1) if there else ():
            for string, width in there:
                if string in self._tokenizer.decode(tokens[max(0, count - width) : count]):
                    return count
        return None


@dataclass(slots=True)
class Answer:
    """One answer on its way. The engine may stop before `hf` would: it looks back further. Then it goes on.

    Attributes:
        prompt: its token ids.
        options: how to go on from it.
        stops: for `options.until`.
        seed: where tokens are drawn.
        tokens: what has come so far.
    """

    prompt: list[int]
    options: GenerationOptions
    stops: StopStrings
    seed: int | None = None
    tokens: list[int] = field(default_factory=list)

    def request(self) -> Request:
        """For what is missing.

        Raises:
            ValueError: the options are impossible.
        """
        have, least = len(self.tokens), self.options.least_tokens(len(self.prompt))
        most = 1 if "" in self.options.until else self.options.most_tokens(len(self.prompt))
        # before the least number the engine takes none of these for an end, `hf` takes the strings for one
        single = () if least else self.stops.single_tokens
        params = SamplingParams(
            max_tokens=most - have,
            min_tokens=max(0, min(least, most) - have),
            stop=self.stops.for_engine,
            stop_token_ids=(*self.options.end_ids, *single),
            ignore_eos=True,  # the end of sequence is among those
            skip_special_tokens=False,
            seed=None if self.seed is None else self.seed + (have << 32),
            **self.options.sampling,
        )
        return Request(self.prompt + self.tokens, params)

    def take(self, completion: Completion) -> bool:
        """Whether what has come completes the answer.

        Raises:
            ValueError: the request failed, or the engine had no room for all of the answer.
        """
        if completion.error is not None:
            raise ValueError(completion.error)
        if completion.finish_reason == "cancelled":
            raise ValueError("it was cancelled")
        self.tokens += completion.token_ids
        end = self.stops.end(self.tokens)
        if end is not None:
            del self.tokens[end:]
            return True
        most = self.options.most_tokens(len(self.prompt))
        if self.tokens[-1] in self.options.end_ids or len(self.tokens) >= most:
            return True
        if completion.finish_reason == "length":
            raise ValueError(
                f"{most} tokens were to follow a prompt of {len(self.prompt)}, the engine's sequences have room for "
                f"{len(self.tokens)}: allow it longer ones, or generate less"
            )
        return False

    def text(self, tokenizer: Any, think_end: str | int | None) -> str:
        """Of a complete answer, behind the last end of thinking in it."""
        tokens = self.tokens
        if isinstance(think_end, int) and think_end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(think_end) :]
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        if isinstance(think_end, int):
            text, think_end = text.lstrip(), None
        cut: str = postprocess_generated_text(text, list(self.options.until), think_end)
        return cut

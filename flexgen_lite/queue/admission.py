"""What becomes of a request on arrival: a sequence that fits the model and the memory, or a refusal that says why."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass, replace

from flexgen_lite.queue.kept_logprobs import KeptLogprobs
from flexgen_lite.queue.open_request import OpenRequest
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.text.shown import shown
from flexgen_lite.tokens.detokenizer import Tokenizer
from flexgen_lite.tokens.stream import TextStream
from flexgen_lite.wire.client_messages import WireRequest
from flexgen_lite.wire.sampling import WireParams

MAX_SEED = 2**63
CHARACTERS_PER_TOKEN = 256  # at most: longer texts are refused before they are cut into tokens


class RequestError(ValueError):
    """A request that cannot be served; the message is for the one who sent it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request has to fit in.

    Attributes:
        kv_tokens: what one attention worker's pages hold.
        prefix_token_id: what stands in front of a text that is scored without a context; None where the model has no
            such token.
    """

    max_length: int
    kv_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    prefix_token_id: int | None = None


class Admission:
    """Args:
    tokenizer: None where the model has none; prompts are then token ids.
    """

    def __init__(self, limits: Limits, tokenizer: Tokenizer | None) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._next_id = 1

    def accept(self, request: WireRequest, owner: OpenRequest) -> RunningRequest:
        """The first sequence of a request; its max_tokens are lowered to what the model takes.

        Raises:
            RequestError: it cannot be served.
        """
        limits, params = self._limits, request.params
        tokens = self._tokenize(request)
        if request.context >= 0:
            tokens, params = self._split(tokens, request)
        wrong = params.problem()
        if wrong is not None:
            raise RequestError(wrong)
        if not tokens:
            raise RequestError("the prompt is empty: give at least one token")
        if params.stop and self._tokenizer is None:
            raise RequestError("the model has no tokenizer: give stop_token_ids instead of stop")
        for token in (*tokens, *params.stop_token_ids, *(token for token, _ in params.logit_bias)):
            if not 0 <= token < limits.vocab_size:
                raise RequestError(f"token id {token} is outside the vocabulary of {limits.vocab_size}")
        room = limits.max_length - len(tokens)
        if room < (1 if params.max_tokens else -1):  # the last token of what is only scored is not computed
            raise RequestError(
                f"the prompt has {len(tokens)} tokens, the model takes {limits.max_length} with what it generates: "
                "shorten the prompt"
            )
        if params.max_tokens > max(0, room):
            params = replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
        if params.logprobs is not None:
            params = replace(params, logprobs=min(params.logprobs, limits.vocab_size))
        if params.prompt_logprobs is not None:
            params = replace(params, prompt_logprobs=min(params.prompt_logprobs, limits.vocab_size))
        sequence = self._make_sequence(tokens, replace(request, params=params), owner)
        if sequence.most_stored > limits.kv_tokens:
            raise RequestError(
                f"the request needs {sequence.most_stored} tokens of KV cache ({len(tokens)} in the prompt, up to "
                f"{params.max_tokens} generated), an attention worker holds {limits.kv_tokens}: "
                "lower max_tokens or raise ram"
            )
        return sequence

    def _make_sequence(self, tokens: list[int], request: WireRequest, owner: OpenRequest) -> RunningRequest:
        params = request.params
        end_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            end_ids |= frozenset(self._limits.eos_token_ids)
        first_id, self._next_id = self._next_id, self._next_id + params.n
        sequence = RunningRequest(
            first_id,
            array("i", tokens),  # thousands may wait: four bytes a token
            len(tokens),
            params,
            random.randrange(MAX_SEED) if params.seed is None else params.seed,
            end_ids,
            owner=owner,
        )
        if params.logprobs is not None:
            sequence.logprobs = KeptLogprobs(params.logprobs)
        if params.prompt_logprobs is not None:
            sequence.prompt_logprobs = KeptLogprobs(params.prompt_logprobs)
        sequence.is_streamed = request.stream
        if params.stop or request.stream or params.logprobs is not None:
            sequence.text = TextStream(self._tokenizer, params, len(tokens))
        if request.echo and isinstance(request.prompt, str):
            owner.num_added = self._num_added(request.prompt, tokens)
        return sequence

    def _split(self, tokens: list[int], request: WireRequest) -> tuple[list[int], WireParams]:
        """The tokens of a text and its params, which tell where the part begins that is scored."""
        if self._tokenizer is None or not isinstance(request.prompt, str):
            raise RequestError("a context was given as characters: give it with a text")
        before = len(self._tokenizer.encode(request.prompt[: request.context], request.add_special_tokens))
        if before == 0:
            if self._limits.prefix_token_id is None:
                raise RequestError("the model has no token to begin with: give a context")
            tokens, before = [self._limits.prefix_token_id, *tokens], 1
        if request.context > 0 and before >= len(tokens):
            raise RequestError(
                f"the continuation {shown(request.prompt[request.context :])} has no token of its own: the tokenizer "
                "makes one of it and the end of the context"
            )
        return tokens, replace(request.params, scored_from=before)

    def _tokenize(self, request: WireRequest) -> list[int]:
        prompt = request.prompt
        if isinstance(prompt, tuple):
            return list(prompt)
        if self._tokenizer is None:
            raise RequestError("the model has no tokenizer: give the prompt as token ids")
        if len(prompt) > CHARACTERS_PER_TOKEN * self._limits.max_length:
            raise RequestError(
                f"the prompt has {len(prompt)} characters, the model takes {self._limits.max_length} tokens: "
                "shorten the prompt"
            )
        return self._tokenizer.encode(prompt, request.add_special_tokens)

    def _num_added(self, prompt: str, tokens: list[int]) -> tuple[int, int]:
        """How many of a text's tokens the tokenizer has put in front of it, and behind it."""
        own = self._tokenizer.encode(prompt, False) if self._tokenizer is not None else tokens
        more = len(tokens) - len(own)
        front = next((n for n in range(more + 1) if tokens[n : n + len(own)] == own), None)
        return (0, 0) if front is None else (front, more - front)

"""From sequences that are over to what their client is told: texts, logprobs, the prompt."""

from __future__ import annotations

from collections.abc import Iterable

from flexgen_lite.queue.open_request import OpenRequest, Origin, Output
from flexgen_lite.queue.running_request import RunningRequest
from flexgen_lite.tokens.detokenizer import Detokenizer, Tokenizer
from flexgen_lite.tokens.stream import TextStream
from flexgen_lite.wire.client_messages import RequestDelta, RequestDone, WireOutput, WirePrompt
from flexgen_lite.wire.sampling import TokenLogprobs


class Responses:
    """Args:
    tokenizer: None where the model has none; answers then have no text.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}  # of tokens that were asked for

    def output(self, sequence: RunningRequest, reason: str) -> Output:
        """What came of a sequence that is over."""
        first = sequence.num_prompt_tokens
        text = sequence.text
        if text is None:
            text = TextStream(self._tokenizer, sequence.params, first)
            text.read(sequence.tokens[:-1] if reason == "stop" else sequence.tokens)
        return Output(text.finish(), sequence.tokens[first:], reason, sequence.logprobs, text.offsets)

    def prompt(self, sequence: RunningRequest, owner: OpenRequest) -> WirePrompt | None:
        """The prompt of a request's first sequence, if it was asked for."""
        if not owner.echo and sequence.prompt_logprobs is None:
            return None
        token_ids = list(sequence.tokens[: sequence.num_prompt_tokens])
        with_offsets = owner.echo and sequence.params.logprobs is not None
        text, offsets = "", [0] * len(token_ids) if with_offsets else []
        if owner.echo and self._tokenizer is not None:
            text, offsets = _prompt_text(self._tokenizer, token_ids, owner.num_added, with_offsets)
        scored = sequence.prompt_logprobs
        if scored is not None and len(scored) < sequence.num_prompt_tokens - sequence.params.scored_from:
            scored = None  # it was cancelled meanwhile
        return WirePrompt(text, tuple(token_ids), tuple(scored or ()), tuple(offsets))

    def done(self, owner: OpenRequest, num_prompt_tokens: int) -> RequestDone:
        """All that came of a request."""
        origin, kept = owner.origin, [owner.outputs[number] for number in sorted(owner.outputs)]
        outputs = tuple(
            WireOutput(o.text, tuple(o.token_ids), o.finish_reason, tuple(o.logprobs or ()), tuple(o.offsets))
            for o in kept
        )
        wanted: set[int] = set()
        for output in outputs:
            if output.logprobs:
                wanted |= {*output.token_ids, *_tokens_of(output.logprobs)}
        if owner.prompt is not None and (owner.echo or owner.prompt.logprobs):
            wanted |= {*owner.prompt.token_ids, *_tokens_of(owner.prompt.logprobs)}
        texts, raw = self._of_tokens(wanted)
        return RequestDone(origin.job_id, origin.index, num_prompt_tokens, outputs, None, owner.prompt, texts, raw)

    def delta(self, sequence: RunningRequest) -> RequestDelta | None:
        """What has come of a sequence that goes on and whose reader waits for it; None where nothing can be told."""
        owner, stream = sequence.owner, sequence.text
        if owner is None or stream is None:
            return None
        first = stream.told
        text, end = stream.take()
        token_ids = tuple(sequence.tokens[first:end])
        if not text and not token_ids:
            return None
        answer = sequence.num_prompt_tokens
        kept, offsets = sequence.logprobs, tuple(stream.offsets[first - answer : end - answer])
        logprobs = () if kept is None else tuple(kept.between(first - answer, end - answer))
        texts, raw = self._of_tokens({*token_ids, *_tokens_of(logprobs)} if logprobs else ())
        origin = owner.origin
        return RequestDelta(
            origin.job_id, origin.index, sequence.number, text, token_ids, logprobs, texts, raw, offsets
        )

    def _of_tokens(self, tokens: Iterable[int]) -> tuple[dict[int, str], dict[int, bytes]]:
        """The text of each token, and the bytes of those that are not whole characters."""
        if self._tokenizer is None:
            return {}, {}
        texts, raw = {}, {}
        for token in tokens:
            texts[token] = self._token_text(self._tokenizer, token)
            own = self._tokenizer.token_bytes(token)
            if own is not None and own != texts[token].encode():
                raw[token] = own
        return texts, raw

    def _token_text(self, tokenizer: Tokenizer, token: int) -> str:
        """As it would stand within a text: many tokenizers drop a space in front of the first token."""
        if token not in self._texts:
            own = tokenizer.token_bytes(token)
            if own is not None:
                self._texts[token] = own.decode(errors="replace")
            else:
                one, two = (tokenizer.decode([token] * count, False) for count in (1, 2))
                self._texts[token] = two[len(one) :] if two.startswith(one) else one
        return self._texts[token]


def refusal(origin: Origin, error: str) -> RequestDone:
    """The answer to a request that failed."""
    return RequestDone(origin.job_id, origin.index, 0, (), error)


def _prompt_text(
    tokenizer: Tokenizer, token_ids: list[int], num_added: tuple[int, int], with_offsets: bool
) -> tuple[str, list[int]]:
    """The text without what the tokenizer has put around it, up to a character that it ends within; where what each
    token adds begins in it, if that is wanted."""
    front, back = num_added
    own = token_ids[front : len(token_ids) - back]
    detokenizer = Detokenizer(tokenizer, False, ())
    if not with_offsets:
        return detokenizer.feed(own) + detokenizer.uncertain, []
    offsets, pieces = [0] * front, []
    for token in own:
        pieces.append(detokenizer.feed((token,)))
        offsets.append(detokenizer.begin)
    text = "".join(pieces) + detokenizer.uncertain
    return text, [min(offset, len(text)) for offset in offsets + [len(text)] * back]


def _tokens_of(logprobs: Iterable[TokenLogprobs]) -> set[int]:
    return {token for found in logprobs for token, _ in found.top}

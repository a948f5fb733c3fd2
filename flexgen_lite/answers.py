"""From sequences that are over to what their client is told: texts, logprobs, the prompt."""

from __future__ import annotations

from collections.abc import Iterable

from flexgen_lite.admission import Tokenizer
from flexgen_lite.client_messages import RequestDelta, RequestDone, WireOutput, WirePrompt
from flexgen_lite.open_request import OpenRequest, Origin, Output
from flexgen_lite.running_request import RunningRequest
from flexgen_lite.sampling_wire import TokenLogprobs


class Answers:
    """Args:
    tokenizer: None where the model has none; answers then have no text.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}  # of tokens that were asked for

    def output(self, sequence: RunningRequest, reason: str) -> Output:
        """What came of a sequence that is over."""
        token_ids = sequence.tokens[sequence.num_prompt_tokens :]
        shown = token_ids[:-1] if reason == "stop" and not sequence.has_stop_string else token_ids
        text = self._decode(list(shown), sequence.params.skip_special_tokens)
        if sequence.stop_strings is not None and sequence.has_stop_string:
            text = sequence.stop_strings.cut(text, shown, sequence.params.include_stop_str_in_output)
        return Output(text, token_ids, reason, sequence.logprobs)

    def prompt(self, sequence: RunningRequest, echo: bool) -> WirePrompt | None:
        """The prompt of a request's first sequence, if it was asked for."""
        if not echo and sequence.prompt_logprobs is None:
            return None
        token_ids = list(sequence.tokens[: sequence.num_prompt_tokens])
        text = self._decode(token_ids, False) if echo else ""
        scored = sequence.prompt_logprobs
        if scored is not None and len(scored) < sequence.num_prompt_tokens - sequence.params.scored_from:
            scored = None  # it was cancelled meanwhile
        return WirePrompt(text, tuple(token_ids), tuple(scored or ()))

    def done(self, owner: OpenRequest, num_prompt_tokens: int) -> RequestDone:
        """All that came of a request."""
        origin, kept = owner.origin, [owner.outputs[number] for number in sorted(owner.outputs)]
        outputs = [WireOutput(o.text, tuple(o.token_ids), o.finish_reason, tuple(o.logprobs or ())) for o in kept]
        wanted: set[int] = set()
        for output in outputs:
            if output.logprobs:
                wanted |= {*output.token_ids, *_tokens_of(output.logprobs)}
        if owner.prompt is not None and (owner.echo or owner.prompt.logprobs):
            wanted |= {*owner.prompt.token_ids, *_tokens_of(owner.prompt.logprobs)}
        return RequestDone(
            origin.job_id,
            origin.index,
            num_prompt_tokens,
            tuple(outputs),
            None,
            owner.prompt,
            {token: self._token_text(token) for token in wanted} if self._tokenizer else {},
        )

    def delta(self, sequence: RunningRequest) -> RequestDelta | None:
        """What has come of a sequence that goes on and whose reader waits for it; None where nothing can be told."""
        owner, stream = sequence.owner, sequence.stream
        if owner is None or stream is None:
            return None
        first = stream.told
        text = stream.next(sequence.tokens)
        token_ids = tuple(sequence.tokens[first:])
        kept = sequence.logprobs
        logprobs = () if kept is None else tuple(kept.since(first - sequence.num_prompt_tokens))
        wanted = {*token_ids, *_tokens_of(logprobs)} if logprobs else set()
        texts = {token: self._token_text(token) for token in wanted} if self._tokenizer else {}
        origin = owner.origin
        return RequestDelta(origin.job_id, origin.index, sequence.number, text, token_ids, logprobs, texts)

    def _decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens) if self._tokenizer else ""

    def _token_text(self, token: int) -> str:
        """As it would stand within a text: many tokenizers drop a space in front of the first token."""
        if token not in self._texts:
            one, two = (self._decode([token] * count, False) for count in (1, 2))
            self._texts[token] = two[len(one) :] if two.startswith(one) else one
        return self._texts[token]


def refusal(origin: Origin, error: str) -> RequestDone:
    """The answer to a request that failed."""
    return RequestDone(origin.job_id, origin.index, 0, (), error)


def _tokens_of(logprobs: Iterable[TokenLogprobs]) -> set[int]:
    return {token for found in logprobs for token, _ in found.top}

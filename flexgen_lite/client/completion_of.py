"""From what the engine says of a request to the Completion that its user gets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from flexgen_lite.client.completion import Completion, CompletionOutput, Delta, Logprob, Prompt
from flexgen_lite.wire.client_messages import RequestDelta, RequestDone, WireOutput
from flexgen_lite.wire.sampling import TokenLogprobs, WireParams


def completion_of(message: RequestDone, prompt: Prompt, params: WireParams) -> Completion:
    """`prompt` and `params`: what the request asked for."""
    given = message.prompt
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    if given is not None and params.prompt_logprobs is not None:
        first = len(given.token_ids) - len(given.logprobs)
        prompt_logprobs = [None] * first
        prompt_logprobs += _places(given.token_ids[first:], given.logprobs, message.token_texts)
    with_logprobs = params.logprobs is not None
    return Completion(
        index=message.index,
        prompt=prompt,
        outputs=[_output(output, message.token_texts, with_logprobs) for output in message.outputs],
        num_prompt_tokens=message.num_prompt_tokens,
        error=message.error,
        prompt_token_ids=None if given is None else list(given.token_ids),
        prompt_logprobs=prompt_logprobs,
        prompt_text=None if given is None or not given.text else given.text,
        token_texts=message.token_texts,
        token_bytes=message.token_bytes,
        prompt_offsets=None if given is None or not given.offsets else list(given.offsets),
    )


def _output(output: WireOutput, texts: dict[int, str], with_logprobs: bool) -> CompletionOutput:
    logprobs = _places(output.token_ids, output.logprobs, texts) if with_logprobs else None
    offsets = list(output.offsets) if with_logprobs else None
    return CompletionOutput(output.text, list(output.token_ids), output.finish_reason, logprobs, offsets)


def _places(
    tokens: Iterable[int], logprobs: Iterable[TokenLogprobs], texts: dict[int, str]
) -> list[dict[int, Logprob]]:
    places = []
    for token, found in zip(tokens, logprobs, strict=False):
        place = {token: Logprob(found.logprob, found.rank, texts.get(token, ""))}
        for rank, (other, logprob) in enumerate(found.top, start=1):
            place.setdefault(other, Logprob(logprob, rank, texts.get(other, "")))
        places.append(place)
    return places


def delta_of(message: RequestDelta, params: WireParams) -> Delta:
    """What the engine tells of a sequence that goes on."""
    with_logprobs = params.logprobs is not None
    logprobs = _places(message.token_ids, message.logprobs, message.token_texts) if with_logprobs else None
    return Delta(
        message.index,
        message.number,
        message.text,
        list(message.token_ids),
        logprobs,
        text_offsets=list(message.offsets) if with_logprobs else None,
        token_bytes=message.token_bytes,
    )


def last_deltas(completion: Completion, told: Mapping[int, tuple[int, int]]) -> Iterator[Delta]:
    """The rest of each answer; `told`: characters and tokens of it that the reader has, by its number."""
    for number, output in enumerate(completion.outputs):
        characters, tokens = told.get(number, (0, 0))
        logprobs = None if output.logprobs is None else output.logprobs[tokens:]
        offsets = None if output.text_offsets is None else output.text_offsets[tokens:]
        text, token_ids = output.text[characters:], output.token_ids[tokens:]
        raw = completion.token_bytes
        yield Delta(completion.index, number, text, token_ids, logprobs, output.finish_reason, offsets, raw)

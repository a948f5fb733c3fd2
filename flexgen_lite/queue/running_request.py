"""A sequence as the passes see it: pure logic."""

from __future__ import annotations

from collections.abc import MutableSequence
from dataclasses import dataclass

from flexgen_lite.queue.kept_logprobs import KeptLogprobs
from flexgen_lite.queue.open_request import OpenRequest
from flexgen_lite.queue.parked import Parked
from flexgen_lite.tokens.stream import TextStream
from flexgen_lite.wire.arena_specs import PageRun
from flexgen_lite.wire.sampling import Penalties, Sample, WireParams


@dataclass(slots=True, eq=False)
class RunningRequest:
    """A sequence as the passes see it: `tokens` is the prompt and what was generated; the first `stored` of them have
    their K and V in `pages` of attention worker `worker`.

    It is the `number`-th of the sequences that `owner` asks for; `id`s rise in the order of arrival.
    """

    id: int
    tokens: MutableSequence[int]
    num_prompt_tokens: int
    params: WireParams
    seed: int
    end_ids: frozenset[int]
    stored: int = 0
    worker: int = -1
    pages: tuple[PageRun, ...] = ()
    state: int = -1  # of the model's states, two places of which are its own, see StateStore; -1: it has none
    half: int = 0  # which of them is current
    times_preempted: int = 0
    computed: int = 0  # tokens whose K and V were ever computed or read
    parked: Parked | None = None  # where its K and V are if it had to make room
    moving: bool = False  # its pages are being written to disk, or read: nothing else may be done with them
    overflowed: bool = False  # the model's numbers did, so that there is no next token
    logprobs: KeptLogprobs | None = None  # of the generated tokens, if asked for
    prompt_logprobs: KeptLogprobs | None = None  # of those of the prompt from `scored_from` on, if asked for
    owner: OpenRequest | None = None
    number: int = 0
    text: TextStream | None = None  # of the answer, where something is asked of it before it is complete
    is_streamed: bool = False  # a reader wants its tokens as they come
    block_keys: tuple[bytes, ...] | None = None  # of the prompt's full blocks, once they are asked for

    @property
    def state_places(self) -> tuple[int, int]:
        """From where its state is read in the next pass, and where it is written; -1: there is none."""
        if self.state < 0:
            return -1, -1
        current = 2 * self.state + self.half
        return (current if self.stored else -1), current ^ 1

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def most_stored(self) -> int:
        """Tokens whose K and V are stored when it ends: all but the last."""
        return self.num_prompt_tokens + self.params.max_tokens - 1

    @property
    def most_shared(self) -> int:
        """Tokens that need not be computed where others have stored them: neither those whose successors are scored,
        nor the last one that is to be computed."""
        most = min(self.num_prompt_tokens, self.most_stored)
        if self.prompt_logprobs is not None:
            most = min(most, self.params.scored_from + len(self.prompt_logprobs))
        return max(0, most - 1)

    @property
    def num_left(self) -> int:
        """Known tokens that are to be computed and stored."""
        return min(len(self.tokens), self.most_stored) - self.stored

    def stored_in_two_passes(self, rows: int) -> int:
        """Tokens that are stored, at most, when a pass with so many of its rows has ended, and the next token's."""
        end = self.stored + min(self.num_left, rows)
        return end if end >= self.most_stored or end < len(self.tokens) else end + 1

    @property
    def finish_reason(self) -> str | None:
        """ "stop" or "length" once the request is complete."""
        generated = self.num_generated
        if generated == 0:
            return "length" if self.params.max_tokens == 0 and self.num_left == 0 else None
        if generated >= self.params.min_tokens and (self.tokens[-1] in self.end_ids or self.has_stop_string):
            return "stop"
        return "length" if generated >= self.params.max_tokens else None

    @property
    def has_stop_string(self) -> bool:
        """Whether the generated text has one, as of its last token."""
        return self.text is not None and self.text.found

    def add(self, token: int) -> None:
        """The next token, as it was drawn."""
        self.tokens.append(token)
        if self.text is None:
            return
        if token in self.end_ids and self.num_generated >= self.params.min_tokens:
            self.text.read_end(self.tokens)
        else:
            self.text.read(self.tokens)

    def make_sibling(self) -> RunningRequest | None:
        """The next sequence from the same prompt, if one is wanted that has not been made."""
        owner = self.owner
        if owner is None or owner.num_made == owner.num_sequences or self.number != owner.num_made - 1:
            return None
        owner.num_made += 1
        owner.num_live += 1
        return RunningRequest(
            self.id + 1,
            self.tokens[: self.num_prompt_tokens],
            self.num_prompt_tokens,
            self.params,
            self.seed + 1,
            self.end_ids,
            logprobs=KeptLogprobs(self.params.logprobs) if self.params.logprobs is not None else None,
            owner=owner,
            number=self.number + 1,
            block_keys=self.block_keys,
            text=self.text.afresh() if self.text is not None else None,
            is_streamed=self.is_streamed,
        )

    def next_sample(self) -> Sample:
        params = self.params
        return Sample(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            seed=self.seed,
            step=self.num_generated,
            banned=tuple(sorted(self.end_ids)) if self.num_generated < params.min_tokens else (),
            min_p=params.min_p,
            bias=params.logit_bias,
            penalties=self._penalties(),
            num_logprobs=-1 if params.logprobs is None else params.logprobs,
        )

    def _penalties(self) -> Penalties | None:
        params, first = self.params, self.num_prompt_tokens
        if params.repetition_penalty == 1 and params.presence_penalty == 0 and params.frequency_penalty == 0:
            return None
        prompt = sorted(set(self.tokens[:first])) if params.repetition_penalty != 1 else ()
        return Penalties(
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            tuple(prompt),
            tuple(self.tokens[first:]),
        )

"""A client's request from its arrival to its answer: one prompt, and one sequence or several that go on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from flexgen_lite.queue.kept_logprobs import KeptLogprobs
from flexgen_lite.wire.client_messages import WirePrompt

NOBODY = b""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request came from; `client` is None for a kept job's, and NOBODY where the answer is for nobody."""

    client: bytes | None
    job_id: str
    index: int


@dataclass(frozen=True, slots=True)
class Output:
    """A sequence that is over, as small as it can wait for the others of its request."""

    text: str
    token_ids: Sequence[int]
    finish_reason: str
    logprobs: KeptLogprobs | None
    offsets: Sequence[int] = ()  # of its tokens in the text, where logprobs were asked for


@dataclass(slots=True, eq=False)
class OpenRequest:
    """Its sequences are made one after the other, each when the one before it has begun to run.

    Attributes:
        origin: who is to be told.
        num_sequences: answers that were asked for.
        echo: the answer has the prompt.
        priority: lower ones run first.
        num_made: sequences so far.
        num_live: those that wait or run.
        outputs: of sequences that are over, by their number.
        prompt: as the answer is to have it, once the first sequence is over.
        num_added: tokens that the tokenizer has put in front of the prompt's text, and behind it; known for an echo.
        answered: nobody waits for it any more.
    """

    origin: Origin
    num_sequences: int = 1
    echo: bool = False
    priority: int = 0
    num_made: int = 1
    num_live: int = 1
    outputs: dict[int, Output] = field(default_factory=dict)
    prompt: WirePrompt | None = None
    num_added: tuple[int, int] = (0, 0)
    answered: bool = False

    @property
    def who(self) -> tuple[bytes | None, str]:
        """Those among whom the engine is shared: clients, and kept jobs."""
        return (self.origin.client, "") if self.origin.client is not None else (None, self.origin.job_id)

    def give_up_the_rest(self) -> None:
        """No further sequences are made."""
        self.num_sequences = self.num_made

    @property
    def is_complete(self) -> bool:
        return self.num_live == 0 and self.num_made == self.num_sequences

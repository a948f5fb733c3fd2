"""The messages of clients and the coordinator."""

from __future__ import annotations

from dataclasses import dataclass, field

from flexgen_lite.wire.sampling import TokenLogprobs, WireParams
from flexgen_lite.wire.worker_messages import WireChatTemplate

PROTOCOL = 7
"""Version of these messages."""


@dataclass(frozen=True, slots=True)
class WireRequest:
    """`prompt`: text, or token ids. `echo`: the answer is to have the prompt's text and token ids.
    `add_special_tokens`: those that the tokenizer puts around a text. `context`: so many characters of a text are what
    the rest is scored after; -1 for all texts that are not scored in two parts. `stream`: tell of its tokens as they
    come."""

    index: int  # unique within its job
    prompt: str | tuple[int, ...]
    params: WireParams
    echo: bool = False
    add_special_tokens: bool = True
    context: int = -1
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Connect:
    """A client's first message."""

    protocol: int


@dataclass(frozen=True, slots=True)
class Submit:
    """Requests of a job; a job may be submitted in several parts, with rising indices: one not above those before it
    was submitted already, and is ignored.

    With `keep` the job belongs to no client: it goes on when its client goes, and its results are kept until it is
    cancelled. Whoever submits it again, with the same requests from index 0 on, gets all results, old and new."""

    job_id: str
    requests: tuple[WireRequest, ...]
    keep: bool
    priority: int = 0  # lower ones come first


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop what is left of a job, and what is kept of it."""

    job_id: str


@dataclass(frozen=True, slots=True)
class GetStatus:
    pass


@dataclass(frozen=True, slots=True)
class ReadDeltas:
    """So many more RequestDelta were read: the engine sends a client no more than MAX_UNREAD_DELTAS ahead."""

    count: int


ToEngine = Connect | Submit | Cancel | GetStatus | ReadDeltas


@dataclass(frozen=True, slots=True)
class Welcome:
    protocol: int
    model: str
    fingerprint: str  # the same as long as the same prompt gets the same greedy tokens
    max_length: int
    window: int  # requests a client may have submitted and not got back
    plan: str  # for people
    chat_template: WireChatTemplate | None = None


@dataclass(frozen=True, slots=True)
class WireOutput:
    """One answer to a prompt. finish_reason: "stop", "length" or "cancelled". `logprobs`: of each generated token, if
    asked for. `offsets`: with them, how many characters of the text are in front of what each of these tokens added."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class WirePrompt:
    """A prompt as the engine saw it, for those who asked. `logprobs`: of its tokens from `scored_from` on. `offsets`:
    with the text and logprobs, where what each token added begins in that text."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestDone:
    """`error` is None for a finished request, which has its outputs. `token_texts`: of every token that occurs in
    logprobs. `token_bytes`: of those of them that are not whole characters."""

    job_id: str
    index: int
    num_prompt_tokens: int
    outputs: tuple[WireOutput, ...]
    error: str | None = None
    prompt: WirePrompt | None = None
    token_texts: dict[int, str] = field(default_factory=dict)
    token_bytes: dict[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestDelta:
    """What has come of a sequence since the last message of it, while it goes on: of the request's `number`-th answer.
    The text of the last tokens may be held back, where it is a part of a character or may become a stop string; with
    `offsets`, which come with logprobs, so are tokens behind such a text."""

    job_id: str
    index: int
    number: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    token_texts: dict[int, str]
    token_bytes: dict[int, bytes] = field(default_factory=dict)
    offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Status:
    """`lanes`: busy share per lane over the last seconds; `totals`: counters since the engine became ready."""

    running: int
    waiting: int
    done: int
    lanes: dict[str, float]
    totals: dict[str, float]
    memory: dict[str, int]  # bytes: "budget", "used", "peak"; with a GPU "gpu_peak" of its memory
    processes: dict[str, dict[str, int]] = field(default_factory=dict)  # bytes of each: "planned", "used", "peak"


@dataclass(frozen=True, slots=True)
class EngineFailed:
    """The engine is going down; every open request ends with this error."""

    message: str


ToClient = Welcome | RequestDelta | RequestDone | Status | EngineFailed

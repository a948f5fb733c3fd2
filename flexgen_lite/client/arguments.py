"""The arguments of the Python API, checked at the door: what is wrong is told by name and position before anything is
sent. What comes out of a generator is checked when it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from flexgen_lite.chat.data import is_record, plain
from flexgen_lite.chat.template import Messages
from flexgen_lite.client.completion import Prompt
from flexgen_lite.client.request import Request, is_one_prompt, wire_prompt
from flexgen_lite.client.sampling_params import SamplingParams, whole_number
from flexgen_lite.text.shown import shown_kind, shown_names

MAX_JOB_ID = 200  # characters
_MAX_PRIORITY = (1 << 63) - 1
_END = object()


def several_prompts(name: str, one: str, prompts: Any) -> tuple[Iterable[Prompt], int | None]:
    """Prompts, of which a single one is the only one, and how many there are, if that is known.

    Args:
        name: of the argument.
        one: what one of its values is called.

    Raises:
        TypeError, ValueError: it cannot be prompts, or one of a list is none.
    """
    if is_one_prompt(prompts):
        prompts = [prompts]
    if not _is_several(prompts):
        raise TypeError(f"{name} is {shown_kind(prompts)}: give a text, a list of token ids, or several of them")
    if hasattr(prompts, "tolist"):  # an array of several rows
        prompts = prompts.tolist()
    if not isinstance(prompts, list | tuple):
        return prompts, None
    for index, prompt in enumerate(prompts):
        wire_prompt(f"{one} {index}", prompt)
    return prompts, len(prompts)


def requests_of(
    prompts: Iterable[Prompt], length: int | None, params: SamplingParams | Iterable[SamplingParams]
) -> Iterator[Request]:
    """A request for each prompt.

    Args:
        length: how many prompts there are, if that is known.
        params: for all, or one for each.

    Raises:
        TypeError: params are none, or one of a list is none.
        ValueError: there are more of the one than of the other; where they come from a generator, when it ends.
    """
    if isinstance(params, SamplingParams):
        return (Request(prompt, params) for prompt in prompts)
    if not _is_several(params):
        raise TypeError(f"params is {shown_kind(params)}: give SamplingParams, or one for each prompt")
    if isinstance(params, list | tuple):
        for index, own in enumerate(params):
            check_params(f"params {index}", own)
        if length is not None and len(params) != length:
            raise ValueError(f"{len(params)} params for {length} prompts: give one, or one for each prompt")
    return _pair(prompts, params)


def _pair(prompts: Iterable[Prompt], params: Iterable[SamplingParams]) -> Iterator[Request]:
    for prompt, own in pairs("prompts", prompts, "params", params):
        yield Request(prompt, own)


def pairs(name: str, firsts: Iterable[Any], other: str, seconds: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """The first with the first, and so on.

    Args:
        name, other: what they are called in a message.

    Raises:
        ValueError: one ends before the other.
    """
    count, rest = 0, iter(seconds)
    for count, first in enumerate(firsts, start=1):
        second = next(rest, _END)
        if second is _END:
            raise ValueError(f"{other} are shorter than {name}: they end after {count - 1}; give one for each")
        yield first, second
    if next(rest, _END) is not _END:
        raise ValueError(f"{name} are shorter than {other}: they end after {count}; give one for each")


def check_params(name: str, params: object) -> None:
    """Raises TypeError."""
    if not isinstance(params, SamplingParams):
        raise TypeError(f"{name} is {shown_kind(params)}: give SamplingParams")


def several_chats(messages: Any) -> tuple[Iterable[Messages], int | None]:
    """Conversations, of which a single one is the only one, and how many there are, if that is known.

    Raises:
        TypeError, ValueError: it cannot be conversations, or one of a list is none.
    """
    if is_one_chat(messages):
        messages = [messages]
    if not _is_several(messages):
        raise TypeError(
            f"messages is {shown_kind(messages)}: give a list of messages with a role and content, or several such "
            "lists"
        )
    if not isinstance(messages, list | tuple):
        return messages, None
    for index, chat in enumerate(messages):
        check_chat(index, chat)
    return messages, len(messages)


def check_chat(index: int, chat: object) -> None:
    """Raises TypeError or ValueError where the `index`-th conversation is none."""
    if not isinstance(chat, list | tuple):
        raise TypeError(f"conversation {index} is {shown_kind(chat)}: give a list of messages with a role and content")
    if not chat:
        raise ValueError(f"conversation {index} has no messages: give at least one")
    for number, message in enumerate(chat):
        name = f"message {number} of conversation {index}"
        if not is_record(message):
            raise TypeError(f"{name} is {shown_kind(message)}: give a dict with a role and content")
        fields = message if isinstance(message, Mapping) else plain(message)
        if not isinstance(fields.get("role"), str):
            found = shown_names(fields) or "nothing"
            raise ValueError(f'{name} has no role, but {found}: give it one, such as "user"')


def is_one_chat(messages: object) -> bool:
    """Whether this is one conversation, rather than several of them."""
    return isinstance(messages, list | tuple) and len(messages) > 0 and is_record(messages[0])


def check_job(job_id: object, keep: object, priority: object) -> int:
    """The priority as the wire takes it.

    Raises:
        TypeError, ValueError: one of them is not allowed.
    """
    if job_id is not None and not isinstance(job_id, str):
        raise TypeError(f"job_id is {shown_kind(job_id)}: give a text of 1 to {MAX_JOB_ID} characters")
    if job_id is not None and not 1 <= len(job_id) <= MAX_JOB_ID:
        raise ValueError(f"job_id has {len(job_id)} characters: give 1 to {MAX_JOB_ID}")
    if job_id is not None and any(0xD800 <= ord(character) < 0xE000 for character in job_id):
        raise ValueError("job_id has characters that are not Unicode text")
    if type(keep) is not bool:
        raise TypeError(f"keep is {shown_kind(keep)}: give True or False")
    return whole_number("priority", priority, -_MAX_PRIORITY, _MAX_PRIORITY)


def _is_several(values: object) -> bool:
    """Whether they come one after the other, in an order."""
    return isinstance(values, Iterable) and not isinstance(values, str | bytes | bytearray | memoryview | Mapping | Set)

"""From messages to the text that a chat model was trained on, by the template that comes with its tokenizer.

The text is that of Transformers' `apply_chat_template`: this follows it in which template it takes, in what it makes of
messages, tools and variables before the template sees them, and in how the last message goes on. Transformers itself
would bring PyTorch into the client.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexgen_lite.chat.data import REASONING, in_one_text, in_parts, is_record, medium_of, plain, plain_message
from flexgen_lite.text.shown import shown
from flexgen_lite.wire.worker_messages import WireChatTemplate

MAX_TEXT = 8 << 20  # characters of a rendered prompt
_MAX_WORDS = 1000  # characters of what a template says of an error
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # as in Transformers, for templates may do something to it
_UNNAMED = ""
_PARAMETERS = ("tools", "add_generation_prompt", "continue_final_message")
_TAKEN = frozenset(
    {
        "chat_template",
        "conversation",
        "conversations",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "self",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    }
)
"""What `apply_chat_template` takes for itself: templates never get a variable of such a name."""
_REMEDY = {"tools": ", such as transformers.utils.get_json_schema makes of a function"}
Messages = Sequence[Mapping[str, Any]]


class ChatError(ValueError):
    """Messages that the model's template does not take, or a model that has none that can be used."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that is to go on.

    Attributes:
        messages: dicts, dataclasses or Pydantic's models, each with a "role" and its "content", and what else the
            template reads. Keys whose value is None are left out.
        tools: JSON schemas of functions, for templates that read them.
        template_kwargs: further variables of the template, such as enable_thinking or documents.
        chat_template: instead of the model's own; or the name of one of the model's own, where it has several.
        add_generation_prompt: end with the beginning of the assistant's answer.
        continue_final_message: end with the last message as it is, so that it goes on; a string is the key of what goes
            on, such as "reasoning_content", instead of "content".
        join_parts: content that comes in several texts becomes one where the template reads no parts, for callers of
            the chat API cannot know. (A text becomes a part where the template reads parts alone, for any caller.)
    """

    messages: Messages
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool | str = False
    join_parts: bool = False

    def __len__(self) -> int:
        return len(self.messages)


def render(chat: Chat, template: WireChatTemplate | None) -> str:
    """The prompt's text; it has its special tokens.

    Args:
        template: the model's; None for a model without a tokenizer.

    Raises:
        ChatError: there is no template, or it is broken, fails, or refuses the messages.
    """
    from flexgen_lite.chat.environment import BrokenTemplate, Refusal, compiled, reads_parts, reads_texts

    chat = _with_parameters(chat)
    source = template_text(chat, template)
    if chat.add_generation_prompt and chat.continue_final_message:
        raise ChatError("add_generation_prompt and continue_final_message exclude each other: give one of them")
    special_tokens = template.special_tokens if template is not None else {}
    variables = _variables(chat)
    tokens = tuple(special_tokens.items())
    if not reads_parts(source, tokens):
        if chat.join_parts:
            variables["messages"] = [in_one_text(message) for message in variables["messages"]]
    elif not reads_texts(source, tokens):
        variables["messages"] = [in_parts(message) for message in variables["messages"]]
    try:
        final = _mark_last(variables["messages"], chat.continue_final_message, source)
        text = compiled(source).render({**special_tokens, **variables})
    except ChatError:
        raise
    except BrokenTemplate as error:
        raise ChatError(f"{_whose(chat, template, source)} has {_shown(error)}") from None
    except Refusal as error:
        raise ChatError(f"the chat template refuses the messages: {_shown(error.message)}") from None
    except Exception as error:  # it is a program, and may fail in any way
        said = f"{type(error).__name__}: {_shown(error)}"
        raise ChatError(f"the chat template fails on the messages: {said}") from None
    if len(text) > MAX_TEXT:
        raise ChatError(f"the messages make a prompt of {len(text)} characters, {MAX_TEXT} allowed: shorten them")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ChatError("the messages make a prompt that has characters that are not Unicode text") from None
    return text if final is None else _cut_behind_last(text, final)


def has_template(template: WireChatTemplate | None) -> bool:
    """Whether a model comes with a chat template, be it one that cannot be used."""
    return template is not None and (template.text is not None or bool(_names(template)))


def brings_program(chat: Chat, template: WireChatTemplate | None) -> bool:
    """Whether a conversation comes with a template, rather than with none, or with the name of one of the model's."""
    return chat.chat_template is not None and (template is None or chat.chat_template not in _names(template))


def template_text(chat: Chat, template: WireChatTemplate | None) -> str:
    """The template of a conversation: the one that it brings or names; else the model's only one, or of several
    "tool_use" where there are tools, or "default".

    Raises:
        ChatError: there is none, or it cannot be read.
    """
    name = chat.chat_template
    if name is not None and not isinstance(name, str):
        raise ChatError(f"chat_template is of the type {type(name).__name__}: give a text")
    if name is not None and brings_program(chat, template):
        return name
    if template is None or not has_template(template):
        raise ChatError("the model has no chat template: give a prompt, or a chat_template")
    if template.text is not None:
        return template.text
    names = _names(template)
    if name is None:
        has_tools = chat.tools is not None or chat.template_kwargs.get("tools") is not None
        usual = ("tool_use", "default") if has_tools else ("default",)
        unreadable = _UNNAMED if _UNNAMED in template.unreadable else None
        name = next((each for each in usual if each in names), unreadable)
    if name is None:
        listed = ", ".join(map(repr, sorted(names)))
        raise ChatError(
            f"the model has chat templates for several uses, {listed}, and no default: "
            f"name one of them, as in chat_template={min(names)!r}"
        )
    if name in template.unreadable:
        which = f"chat template {name!r}" if name != _UNNAMED else "chat template"
        raise ChatError(f"the model's {which} cannot be read: {template.unreadable[name]}")
    return template.named[name]


def _whose(chat: Chat, template: WireChatTemplate | None, source: str) -> str:
    """A template, for a message about it."""
    if template is None or brings_program(chat, template):
        return "chat_template"
    name = next((f" {name!r}" for name, text in template.named.items() if text == source), "")
    return f"the model's chat template{name}"


def _names(template: WireChatTemplate) -> set[str]:
    return template.named.keys() | template.unreadable.keys()


def _with_parameters(chat: Chat) -> Chat:
    """With those of `template_kwargs` in their places that decide about more than what the template sees.

    Raises:
        ChatError: one cannot be given, or is given twice.
    """
    kwargs = dict(chat.template_kwargs)
    taken = sorted(kwargs.keys() & _TAKEN)
    if taken:
        raise ChatError(f"chat_template_kwargs has {', '.join(taken)}, which templates do not get: leave it out")
    if chat.tools is not None and "tools" in kwargs:
        raise ChatError("tools are given twice: leave them out of chat_template_kwargs")
    given = {name: kwargs.pop(name) for name in _PARAMETERS if name in kwargs}
    return dataclasses.replace(chat, template_kwargs=kwargs, **given)


def _variables(chat: Chat) -> dict[str, Any]:
    """What the template sees, but for the special tokens, which give way to it.

    Raises:
        ChatError: it cannot be given to a template.
    """
    if not isinstance(chat.messages, Sequence):
        raise ChatError(f"messages is of the type {type(chat.messages).__name__}: give a list of dicts")
    documents = chat.template_kwargs.get("documents")
    _check_dicts("messages", chat.messages, is_record)
    for what, values in (("tools", chat.tools), ("documents", documents)):
        _check_dicts(what, values, lambda value: isinstance(value, Mapping))
    if not chat.messages:
        raise ChatError("the conversation is empty: give at least one message")
    given = {
        "documents": None,
        **chat.template_kwargs,
        "tools": None if chat.tools is None else list(chat.tools),
        "add_generation_prompt": chat.add_generation_prompt,
    }
    try:
        messages = [plain_message(message) for message in chat.messages]
        variables: dict[str, Any] = {**plain(given), "messages": messages}
    except Exception as error:  # nested too deeply, or an object that cannot be read
        said = f"{type(error).__name__}: {_shown(error)}"
        raise ChatError(f"messages, tools or variables cannot be given to a template: {said}") from None
    for index, message in enumerate(messages):
        if (medium := medium_of(message.get("content"))) is not None:
            raise ChatError(f"messages[{index}] has content of the type {_shown(medium)!r}: only text can be given")
    return variables


def _check_dicts(what: str, values: object, is_one: Callable[[object], bool]) -> None:
    if values is None:
        return
    if not isinstance(values, Iterable):
        raise ChatError(f"{what} is of the type {type(values).__name__}: give a list of dicts")
    for index, value in enumerate(values):
        if not is_one(value):
            kind, remedy = type(value).__name__, _REMEDY.get(what, "")
            raise ChatError(f"{what}[{index}] is of the type {kind}: give a dict{remedy}")


def _mark_last(messages: list[dict[str, Any]], goes_on: bool | str, source: str) -> str | None:
    """Puts _MARK behind the text of the last message that is to go on.

    Returns:
        The text; None where none is to go on.

    Raises:
        ChatError: there is no such text, or the template does not read it.
    """
    if not goes_on:
        return None
    last, key = messages[-1], goes_on if isinstance(goes_on, str) else "content"
    text = last.get(key)
    if text is None:
        raise ChatError(f"the last message cannot be gone on with: it has no {shown(key)}")
    # Reasoning has several names: the template may read any of those.
    keys = [name for name in REASONING if last.get(name) == text] if key in REASONING else [key]
    if not any(name in source for name in keys):
        raise ChatError(f"the last message cannot be gone on with: the chat template does not read {shown(key)}")
    if isinstance(text, list | tuple):
        block = _last_text_block(text)
        text, block["text"] = block["text"], block["text"] + _MARK
        return str(text)
    if not isinstance(text, str):
        raise ChatError(f"the last message cannot be gone on with: its {shown(key)} is no text")
    last.update(dict.fromkeys(keys, text + _MARK))
    return text


def _last_text_block(blocks: Sequence[Any]) -> dict[str, Any]:
    for block in reversed(blocks):
        if isinstance(block, dict | str | list | tuple) and "text" not in block:
            continue
        if isinstance(block, dict) and isinstance(block["text"], str):
            return block
        break
    raise ChatError("the last message cannot be gone on with: it has no text")


def _cut_behind_last(text: str, final: str) -> str:
    """Without what the template puts behind the last message, so that it goes on."""
    at = text.rfind(_MARK.rstrip())
    if at < 0 or final.strip() not in text:
        raise ChatError("the last message cannot be gone on with: the prompt does not have its content as it is")
    # A template that trims messages has trimmed the mark: had it come without, the text would have been trimmed.
    return text[:at] if text.startswith(_MARK, at) else text[:at].rstrip()


def _shown(said: object) -> str:
    """What a template says, for a message: it may have the conversation in it, and what is not Unicode."""
    try:
        text = str(said)
    except Exception:  # a list in lists in lists
        text = f"a {type(said).__name__} that cannot be shown"
    text = text if len(text) <= _MAX_WORDS else text[:_MAX_WORDS] + "..."
    return text.encode("utf-8", "backslashreplace").decode()

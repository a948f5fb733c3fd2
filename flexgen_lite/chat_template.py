"""From messages to the text that a chat model was trained on, by the template that comes with its tokenizer.

The template is run as Transformers' `apply_chat_template` runs it: Jinja in a sandbox, for it is somebody else's
program, with the same filters and functions. Transformers itself would bring PyTorch into the client.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

from flexgen_lite.messages import WireChatTemplate

MAX_TEXT = 8 << 20  # characters of a rendered prompt
_END = "<end of the message that goes on> "
Messages = Sequence[Mapping[str, Any]]


class ChatError(ValueError):
    """Messages that the model's template does not take, or a model that has none."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that is to go on.

    Attributes:
        messages: each with a "role" and its "content", and what else the template reads.
        tools: JSON schemas of functions, for templates that read them.
        template_kwargs: further variables of the template, such as enable_thinking.
        chat_template: instead of the model's own.
        add_generation_prompt: end with the beginning of the assistant's answer.
        continue_final_message: end with the last message as it is, so that it goes on.
    """

    messages: Messages
    tools: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def __len__(self) -> int:
        return len(self.messages)


def render(chat: Chat, template: WireChatTemplate | None) -> str:
    """The prompt's text; it has its special tokens.

    Args:
        template: the model's.

    Raises:
        ChatError: there is no template, or it refuses the messages.
    """
    from jinja2.exceptions import TemplateError

    source = chat.chat_template or (template.text if template is not None else None)
    if source is None:
        raise ChatError("the model has no chat template: give a prompt, or a chat_template")
    special_tokens = template.special_tokens if template is not None else {}
    if chat.add_generation_prompt and chat.continue_final_message:
        raise ChatError("add_generation_prompt and continue_final_message exclude each other: give one of them")
    names: dict[str, Any] = {
        "messages": chat.messages,
        "tools": chat.tools,
        "documents": None,
        "add_generation_prompt": chat.add_generation_prompt,
    }
    try:
        # The messages and variables as JSON has them: no object of ours within the template's reach.
        plain = json.loads(json.dumps(names | dict(chat.template_kwargs)))
        if chat.continue_final_message:
            _mark_last(plain["messages"])
        text: str = _compiled(source).render({**special_tokens, **plain})
    except ChatError:
        raise
    except TemplateError as error:
        raise ChatError(f"the chat template refuses the messages: {error.message or type(error).__name__}") from None
    except Exception as error:  # it is a program, and may fail in any way
        raise ChatError(f"the chat template fails on the messages: {type(error).__name__}: {error}") from None
    if len(text) > MAX_TEXT:
        raise ChatError(f"the messages make a prompt of {len(text)} characters, {MAX_TEXT} allowed: shorten them")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ChatError("the messages make a prompt that has characters that are not Unicode text") from None
    return _cut_behind_last(text) if chat.continue_final_message else text


def _mark_last(messages: list[dict[str, Any]]) -> None:
    """Puts _END behind the text of the last message."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + _END
        return
    blocks = [block for block in content or () if isinstance(block, dict) and isinstance(block.get("text"), str)]
    if not blocks:
        raise ChatError("the last message cannot be gone on with: it has no text")
    blocks[-1]["text"] += _END


def _cut_behind_last(text: str) -> str:
    """Without what the template puts behind the last message, so that it goes on."""
    at = text.rfind(_END.rstrip())
    if at < 0:
        raise ChatError("the last message cannot be gone on with: the prompt does not have its content as it is")
    # A template that trims messages has trimmed the mark: had it come without, the text would have been trimmed.
    return text[:at] if text.startswith(_END, at) else text[:at].rstrip()


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    from jinja2 import Environment, nodes, parser
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks the assistant's words for training: what is inside stays."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment: Environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)

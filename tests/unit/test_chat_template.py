"""Chat templates, rendered as Transformers renders them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from flexgen_lite.chat_template import Chat, ChatError, render
from flexgen_lite.messages import WireChatTemplate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = """{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
    {%- else %}
        {%- generation %}
        {{- message['content'] + eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}"""
TOOLS = """{%- if tools %}
    {{- tools | tojson(indent=2) }}
{%- endif %}
{%- for message in messages %}
    {%- if loop.index > 3 %}{%- break %}{%- endif %}
    {{- message.role ~ ': ' ~ message.content ~ (' (thinking)' if enable_thinking else '') }}
{% endfor %}"""
TALK = [
    {"role": "user", "content": " Hi & <hello> "},
    {"role": "assistant", "content": "Grüß dich"},
    {"role": "user", "content": "again"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "a <b> & c", "parameters": {}}}


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize(("template", "more"), [(CHATML, {}), (STRICT, {}), (TOOLS, {"enable_thinking": True})])
def test_the_text_is_that_of_transformers(template: str, more: dict[str, Any], add: bool) -> None:
    tools = [TOOL] if more else None
    chat = Chat(TALK, tools, more, add_generation_prompt=add)
    (expected,), _ = render_jinja_template([TALK], tools, None, template, add_generation_prompt=add, **TOKENS, **more)
    assert render(chat, WireChatTemplate(template, TOKENS)) == expected


@pytest.mark.parametrize("content", ["And so ", "```python\n", " Hello", "Hello", " A\n\n B \n"])
@pytest.mark.parametrize("template", [CHATML, CHATML.replace("['content']", "['content'] | trim")])
def test_the_last_message_goes_on(template: str, content: str) -> None:
    talk = [*TALK, {"role": "assistant", "content": content}]
    chat = Chat(talk, add_generation_prompt=False, continue_final_message=True)
    (expected,), _ = render_jinja_template([talk], None, None, template, continue_final_message=True, **TOKENS)
    assert render(chat, WireChatTemplate(template, TOKENS)) == expected


def test_a_last_message_of_several_parts_goes_on() -> None:
    parts = [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two, "}]
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"
    chat = Chat([{"role": "user", "content": parts}], None, {}, template, False, True)
    assert render(chat, None) == "One. Two, "
    with pytest.raises(ChatError, match="it has no text"):
        render(Chat([{"role": "user", "content": []}], None, {}, template, False, True), None)


def test_a_message_cannot_both_go_on_and_be_answered() -> None:
    with pytest.raises(ChatError, match="exclude each other"):
        render(Chat(TALK, continue_final_message=True), WireChatTemplate(CHATML, TOKENS))
    with pytest.raises(ChatError, match="does not have its content"):
        render(Chat(TALK, None, {}, "{{ bos_token }}", False, True), None)


def test_a_prompt_that_is_no_text_is_refused() -> None:
    """From wherever it comes: tools, variables, the template itself."""
    for chat in (
        Chat(TALK, [{"x": "\ud800"}], {}, "{{ tools[0].x }}"),
        Chat(TALK, None, {"x": "\ud800"}, "{{ x }}"),
        Chat(TALK, None, {}, "{{ '\\ud800' }}"),
    ):
        with pytest.raises(ChatError, match="not Unicode text"):
            render(chat, None)


def test_a_template_of_the_request_wins() -> None:
    chat = Chat(TALK, chat_template="{{ messages | length }} {{ bos_token }}")
    assert render(chat, WireChatTemplate(CHATML, TOKENS)) == "3 <s>"
    assert render(chat, None) == "3 "


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (STRICT, "the chat template refuses the messages: roles must alternate"),
        ("{{ messages.nothing.more }}", "the chat template refuses the messages: 'list object' has no attribute"),
        ("{% for %}", "the chat template refuses the messages"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'x' * 9999999 }}", "9999999 characters, 8388608 allowed"),
    ],
)
def test_what_a_template_refuses_or_must_not_do(template: str, words: str) -> None:
    with pytest.raises(ChatError, match=words):
        render(Chat(TALK[1:]), WireChatTemplate(template, TOKENS))


def test_a_model_without_a_template() -> None:
    with pytest.raises(ChatError, match="no chat template"):
        render(Chat(TALK), None)

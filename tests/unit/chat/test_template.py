"""Chat templates, rendered as Transformers renders them."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from flexgen_lite.chat.template import Chat, ChatError, brings_program, has_template, render, template_text
from flexgen_lite.wire.worker_messages import WireChatTemplate

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


def test_a_template_that_reads_parts_alone_gets_parts() -> None:
    """As multimodal models have them; a text would be gone through letter by letter."""
    template = (
        "{% for m in messages %}{{ m.role }}: {% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}|"
        "{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for join_parts in (False, True):
        chat = Chat(
            [{"role": "user", "content": "How?"}, {"role": "assistant", "content": parts}], join_parts=join_parts
        )
        assert render(chat, WireChatTemplate(template, TOKENS)) == "user: How?|assistant: ab|"
    goes_on = Chat([{"role": "user", "content": "How"}], add_generation_prompt=False, continue_final_message=True)
    assert render(goes_on, WireChatTemplate(template, TOKENS)) == "user: How"


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}, {"audio": "x"}])
@pytest.mark.parametrize("template", [CHATML, "{{ messages }}"])
def test_pictures_and_sounds_are_refused(part: dict[str, Any], template: str) -> None:
    chat = Chat([TALK[0], {"role": "user", "content": [{"type": "text", "text": "What is this?"}, part]}])
    with pytest.raises(ChatError, match=r"messages\[1\] has content of the type '(image|image_url|audio)': only text"):
        render(chat, WireChatTemplate(template, TOKENS))


@pytest.mark.parametrize("part", [{"text": "x", "image_caption": "y"}, {"type": "text", "text": "x", "audio_id": 5}])
def test_a_text_that_has_more_than_its_text_is_no_picture(part: dict[str, Any]) -> None:
    chat = Chat([{"role": "user", "content": [part]}])
    assert render(chat, WireChatTemplate("{{ messages[0].content[0].text }}", TOKENS)) == "x"


def test_a_message_cannot_both_go_on_and_be_answered() -> None:
    with pytest.raises(ChatError, match="exclude each other"):
        render(Chat(TALK, continue_final_message=True), WireChatTemplate(CHATML, TOKENS))
    with pytest.raises(ChatError, match="the chat template does not read 'content'"):
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
        ("{{ raise_exception(messages[0]) }}", r"the chat template refuses the messages: \{'role': 'assistant'"),
        ("{{ raise_exception('x' * 2000) }}", r"refuses the messages: x{1000}\.\.\.$"),
        ("{{ raise_exception('\ud800') }}", r"refuses the messages: \\ud800$"),
        (
            "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}"
            "{{ raise_exception(ns.x) }}",
            "refuses the messages: a list that cannot be shown",
        ),
        ("{{ messages.nothing.more }}", "template fails on the messages: UndefinedError: 'list object' has no"),
        ("{{ 1 // 0 }}", "the chat template fails on the messages: ZeroDivisionError"),
        ("{{ raise_exception() }}", "the chat template fails on the messages: TypeError"),
        ("{% for x in range(9) recursive %}{{ loop([1]) }}{% endfor %}", "fails on the messages: RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "fails on the messages: SecurityError: .*unsafe"),
        ("{{ messages.append(1) }}", "fails on the messages: SecurityError: .*unsafe"),
        ("{% set ns = namespace(_x=1) %}", "fails on the messages: SecurityError: .*underscore"),
        ("{{ 'x' * 9999999 }}", "9999999 characters, 8388608 allowed"),
    ],
)
def test_what_a_template_refuses_or_must_not_do(template: str, words: str) -> None:
    with pytest.raises(ChatError, match=words):
        render(Chat(TALK[1:]), WireChatTemplate(template, TOKENS))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}\n\n{{ m.content }", "a syntax error in line 3: unexpected '}'"),
        ("{% for %}", "a syntax error in line 1: Expected an expression"),
        ("\n{% endfor %}", "a syntax error in line 2: Encountered unknown tag 'endfor'"),
        ("{{ 1 | nothing }}", "a syntax error in line 1: No filter named 'nothing'"),
        ("{% break %}", "a syntax error: 'break' outside loop"),
        ("{{ " + "(" * 9999, "an error that keeps it from being compiled: RecursionError"),
    ],
)
def test_a_broken_template_is_said_to_be_broken(template: str, words: str) -> None:
    """And whose it is: nothing is wrong with the messages."""
    with pytest.raises(ChatError, match=f"^the model's chat template has {words}"):
        render(Chat(TALK), WireChatTemplate(template, TOKENS))
    named = WireChatTemplate(None, TOKENS, {"rag": template})
    with pytest.raises(ChatError, match=f"^the model's chat template 'rag' has {words}"):
        render(Chat(TALK, chat_template="rag"), named)
    with pytest.raises(ChatError, match=f"^chat_template has {words}"):
        render(Chat(TALK, chat_template=template), named)


def test_a_model_without_a_template() -> None:
    for template in (None, WireChatTemplate(None, TOKENS), WireChatTemplate(None, TOKENS, {})):
        assert not has_template(template)
        with pytest.raises(ChatError, match="no chat template"):
            render(Chat(TALK), template)
        with pytest.raises(ChatError, match="no chat template"):
            template_text(Chat([]), template)
    assert render(Chat(TALK, chat_template="{{ bos_token }}"), WireChatTemplate(None, TOKENS)) == "<s>"


def test_several_templates_without_a_default() -> None:
    template = WireChatTemplate(None, TOKENS, {"tool_use": "t{{ bos_token }}", "rag": "r"})
    assert has_template(template)
    with pytest.raises(ChatError, match=r"'rag', 'tool_use', and no default: .* chat_template='rag'"):
        render(Chat(TALK), template)
    assert render(Chat(TALK, [TOOL]), template) == "t<s>"
    assert render(Chat(TALK, None, {"tools": [TOOL]}), template) == "t<s>"
    assert render(Chat(TALK, [TOOL], chat_template="rag"), template) == "r"


def test_a_template_that_cannot_be_read() -> None:
    template = WireChatTemplate(None, TOKENS, {"default": "d"}, {"tool_use": "it is no text"})
    assert render(Chat(TALK), template) == "d"
    for chat in (Chat(TALK, [TOOL]), Chat(TALK, chat_template="tool_use")):
        with pytest.raises(ChatError, match="the model's chat template 'tool_use' cannot be read: it is no text"):
            render(chat, template)
    template = WireChatTemplate(None, TOKENS, unreadable={"": "no"})
    assert has_template(template)
    with pytest.raises(ChatError, match="the model's chat template cannot be read: no"):
        render(Chat(TALK), template)
    assert render(Chat(TALK, chat_template="x"), template) == "x"


def test_a_name_of_the_models_is_no_program() -> None:
    template = WireChatTemplate(None, TOKENS, {"tool_use": "t"}, {"rag": "it is no text"})
    for name in (None, "tool_use", "rag"):
        assert not brings_program(Chat(TALK, chat_template=name), template)
    for text in ("default", "", "{{ messages }}"):
        assert brings_program(Chat(TALK, chat_template=text), template)
        assert brings_program(Chat(TALK, chat_template=text), WireChatTemplate("x", TOKENS))
        assert brings_program(Chat(TALK, chat_template=text), None)


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        (Chat([]), "the conversation is empty"),
        (Chat(["x"]), r"messages\[0\] is of the type str: give a dict"),  # type: ignore[list-item]
        (Chat([*TALK, 5]), r"messages\[3\] is of the type int"),  # type: ignore[list-item]
        (Chat(5), "messages is of the type int"),  # type: ignore[arg-type]
        (Chat(None), "messages is of the type NoneType"),  # type: ignore[arg-type]
        (Chat(TALK, 5), "tools is of the type int"),  # type: ignore[arg-type]
        (Chat(TALK, [print]), r"tools\[0\] is of the type builtin_function.*get_json_schema"),  # type: ignore[list-item]
        (Chat(TALK, [TOOL], {"tools": [TOOL]}), "tools are given twice"),
        (Chat(TALK, None, {"documents": ["x"]}), r"documents\[0\] is of the type str"),
        (Chat(TALK, None, {"chat_template": "x", "a": 1, "tokenize": 1}), "has chat_template, tokenize, which"),
        (Chat(TALK, None, {"messages": []}), "chat_template_kwargs has messages"),
        (Chat(TALK, None, {}, ["x"]), "chat_template is of the type list"),  # type: ignore[arg-type]
        (Chat(TALK, None, {"add_generation_prompt": True, "continue_final_message": True}), "exclude each other"),
    ],
)
def test_what_is_given_to_no_template(chat: Chat, words: str) -> None:
    with pytest.raises(ChatError, match=words):
        render(chat, WireChatTemplate(CHATML, TOKENS))


def test_what_is_nested_too_deeply_is_an_error() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for chat in (Chat([{"role": "user", "content": deep}]), Chat(TALK, None, {"x": deep})):
        with pytest.raises(ChatError, match="cannot be given to a template: RecursionError"):
            render(chat, WireChatTemplate(CHATML, TOKENS))


@pytest.mark.parametrize(
    ("content", "key", "words"),
    [
        (None, True, "it has no 'content'"),
        ("x", "reasoning", "it has no 'reasoning'"),
        ("x", "role", "does not read 'role'"),
        (5, True, "its 'content' is no text"),
        ([{"text": None}], True, "it has no text"),
        ([5], True, "it has no text"),
        ("GONE", True, "does not have its content"),
    ],
)
def test_what_does_not_go_on(content: object, key: bool | str, words: str) -> None:
    template = "{% for m in messages %}{{ m.content | replace('GONE', '') }}{% endfor %}"
    with pytest.raises(ChatError, match=f"the last message cannot be gone on with: .*{words}"):
        render(Chat([{"role": "user", "content": content}], None, {}, template, False, key), None)

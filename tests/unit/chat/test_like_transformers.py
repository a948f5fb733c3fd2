"""The prompt of a conversation is the one that Transformers' apply_chat_template makes, of whatever is given to it.
What that refuses is a ChatError."""

from __future__ import annotations

import copy
import dataclasses
import enum
import itertools
import shutil
from collections import UserDict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
from transformers import AutoTokenizer

from flexgen_lite.chat.template import Chat, ChatError, render
from flexgen_lite.demo.pretrained import MODEL
from flexgen_lite.openai.request_body import CHAT, parse_body
from flexgen_lite.workers.model.tokenizer import open_tokenizer
from tests.chat_model import make_chat_model, set_in_config
from tests.real_tokenizers import real_tokenizer

FAILED = object()
ANSWER_IN_PARTS = [{"type": "text", "text": "One. "}, {"type": "note"}, {"type": "text", "text": " Two, "}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": [1, None], "b": "ü <x>"}}}
CALL_AS_TEXT = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1, "b": null}'}}
HI: dict[str, Any] = {"role": "user", "content": " Hi & <hello> "}
CHATS: dict[str, list[Any]] = {
    "user": [HI],
    "turns": [HI, {"role": "assistant", "content": "Grüß dich \n"}, {"role": "user", "content": "again"}],
    "system": [{"role": "system", "content": "Be brief."}, HI],
    "answer": [HI, {"role": "assistant", "content": " Well, \n"}],
    "answer of none": [HI, {"role": "assistant", "content": None}],
    "answer without content": [HI, {"role": "assistant"}],
    "answer of nothing": [HI, {"role": "assistant", "content": ""}],
    "answer in parts": [HI, {"role": "assistant", "content": ANSWER_IN_PARTS}],
    "answer of no parts": [HI, {"role": "assistant", "content": []}],
    "answer of odd parts": [HI, {"role": "assistant", "content": [{"text": "x"}, "y", {"type": "note"}]}],
    "answer of a text as part": [HI, {"role": "assistant", "content": [{"text": "x"}, "text"]}],
    "answer of a number": [HI, {"role": "assistant", "content": 5}],
    "answer of null as part": [HI, {"role": "assistant", "content": [{"type": "text", "text": None}]}],
    "user in parts": [{"role": "user", "content": [{"type": "text", "text": "a", "x": None}, {"type": "text"}]}],
    "calls": [
        HI,
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"x": 1}', "tool_call_id": "c1", "name": "f"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Done", "tool_calls": None},
        {"role": "user", "content": "Thanks", "name": None},
    ],
    "calls with texts": [HI, {"role": "assistant", "content": "", "tool_calls": [CALL_AS_TEXT]}],
    "no calls": [HI, {"role": "assistant", "content": "x", "tool_calls": []}],
    "reasoning": [HI, {"role": "assistant", "content": "a", "reasoning": "why"}, HI],
    "thinking": [HI, {"role": "assistant", "content": "a", "thinking": "why", "reasoning_content": None}],
    "two reasons": [HI, {"role": "assistant", "content": "a", "thinking": "t", "reasoning_content": "r "}],
    "tagged reasoning": [HI, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSo "}, HI],
    "two of a role": [HI, HI],
    "no role": [{"content": "x"}],
    "role of none": [{"role": None, "content": "x"}],
    "empty": [],
    "texts": ["x"],
    "empty message": [{}],
    "numbers": [{"role": "user", "content": 5, "more": {1: (2, 3), None: float("inf")}}],
    "the mark": [HI, {"role": "assistant", "content": "CONTINUE_FINAL_MESSAGE_TAG CONTINUE_FINAL_MESSAGE_TAG"}],
}
TOOL = {"type": "function", "function": {"name": "f", "description": "a <b> & 'c' ü", "parameters": {"x": None}}}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": True},
    {"tools": [TOOL], "add_generation_prompt": True},
    {"tools": []},
    {"tools": ["x"]},
    {"documents": [{"title": "t", "text": None}]},
    {"documents": ["x"]},
    {"documents": []},
    {"continue_final_message": True},
    {"continue_final_message": "reasoning_content"},
    {"continue_final_message": "thinking"},
    {"continue_final_message": "nothing"},
    {"continue_final_message": True, "tools": [TOOL]},
    {"continue_final_message": True, "add_generation_prompt": True},
    {"enable_thinking": False, "add_generation_prompt": True, "bos_token": "[BOS]", "range": 3, "thinking": True},
]
TEMPLATES = {
    "chatml": "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "trimmed": "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "strict": """{{- bos_token }}
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
    {%- endfor %}""",
    "keys": "{% for m in messages %}{% for key, value in m.items() %}{{ key }}={{ value }};{% endfor %}\n{% endfor %}",
    "json": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ documents | tojson(separators=(',', ':')) }}"
    "{{ messages | tojson(ensure_ascii=true, sort_keys=true) }}",
    "asks": "{% for m in messages %}{{ m.content is defined }}{{ m.content is string }}{{ m['content'] is none }}"
    "{{ m.tool_calls is defined }}{{ m.get('name', '-') }}{{ m.nothing }}{% endfor %}{{ tools is none }}"
    "{{ documents is defined }}{{ documents is none }}{{ add_generation_prompt }}{{ enable_thinking is defined }}",
    "parts": "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}[{{ p.type }}]{% endif %}{% endfor %}"
    "{% endif %}</s>{% endfor %}",
    "calls": "{% for m in messages %}{% if m.content is defined %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}({{ c.function.arguments | tojson }})"
    "{% endfor %}{% endfor %}",
    "reasons": "{% for m in messages %}{% if m.thinking %}<a>{{ m.thinking }}</a>{% endif %}"
    "{% if m.reasoning_content is defined %}<b>{{ m.reasoning_content }}</b>{% endif %}{{ m.content }}{% endfor %}",
    "scopes": "{% set x = 1 %}{% set ns = namespace(n=0) %}{% for m in messages %}{% generation %}{% set x = 2 %}"
    "{% set ns.n = ns.n + 1 %}{{ x }}{{ m.content }}{% endgeneration %}{{ x }}{% if loop.index > 2 %}{% break %}"
    "{% endif %}{% if ns.n == 1 %}{% continue %}{% endif %}|{% endfor %}{{ ns.n }}",
    "dicts": "{% set d = dict(a=1, b=messages | length) %}{{ d }}{{ dict.fromkeys(['x'], 2) }}{{ dict is mapping }}"
    "{{ dict([('k', 1)]).k }}{{ namespace({'self': 1}, self=2).self }}",
    "private name": "{% set ns = namespace(_x=1) %}",
    "private name later": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "class of dict": "{{ dict.mro() }}",
    "today": "{{ strftime_now('%Y-%m') }}{{ strftime_now(format='%Y') }}",
    "lower": "{% for m in messages %}{{ m.content | lower }}{% endfor %}",
    "upper": "{% for m in messages %}{{ (m.content | string) | upper }}.{% endfor %}",
    "escaped": "{% for m in messages %}{{ m.content | e }}{% endfor %}",
    "lengths": "{% for m in messages %}{{ m.content | length }}:{{ m.content }}{% endfor %}",
    "twice": "{% for m in messages %}{{ m.content }}|{{ m.content }}{% endfor %}",
    "words": "{% for m in messages %}{{ m.content.split() | join('_') }}{% endfor %}",
    "no messages": "{{ bos_token }}{{ range }}",
    "empty": "",
    "appends": "{{ messages.append(1) }}",
    "classes": "{{ ''.__class__.__mro__ }}",
    "unknown": "{{ messages.nothing.more }}",
    "raises": "{{ raise_exception(messages) }}",
    "raises nothing": "{{ raise_exception() }}",
    "divides": "{{ 1 // 0 }}",
    "syntax": "{% for m in messages %}\n{{ m.content }",
    "tag": "{% nothing %}",
    "filter": "{{ messages | nothing }}",
    "break outside": "{% break %}",
    "break inside generation": "{% for m in messages %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
    "macros": "{% macro say(content, more=true) %}{{ content }}{{ 's' if more }}{% endmacro %}"
    "{% for m in messages[::-1] %}{{ say(m.content, false) }}{{- loop.last }}{% endfor %}",
    "whitespace": "  {% if true %}\n  a\n  {% endif %}\n{# note #}\n  {{ messages[0].content }}\n\n",
    "scalars": "{{ none }}{{ None }}{{ true }}{{ 1.0 }}{{ messages[0].more }}{{ messages[0].more[1] is sequence }}",
}
NEVER = {
    "private name", "private name later", "class of dict", "appends", "classes", "unknown", "raises", "raises nothing",
    "divides", "syntax", "tag", "filter", "break outside", "break inside generation",
}  # fmt: skip
"""Templates that take nothing."""


def expected(tokenizer: Any, messages: Any, options: Mapping[str, Any]) -> Any:
    try:
        return tokenizer.apply_chat_template(copy.deepcopy(messages), tokenize=False, **options)
    except Exception:  # of any kind: AttributeError, TypeError, TemplateError, ...
        return FAILED


def chat_of(messages: Any, options: Mapping[str, Any]) -> Chat:
    """The conversation that we are given for a call of apply_chat_template."""
    known = {field.name for field in dataclasses.fields(Chat)} & options.keys()
    given = {"add_generation_prompt": False} | {name: options[name] for name in known}
    return Chat(messages, template_kwargs={k: v for k, v in options.items() if k not in known}, **given)


def found(template: Any, messages: Any, options: Mapping[str, Any]) -> Any:
    before = repr(messages)
    try:
        return render(chat_of(messages, options), template)
    except ChatError:
        return FAILED
    finally:
        assert repr(messages) == before, "what the caller gave stays as it was"


def num_alike(tokenizer: Any, template: Any, options: list[dict[str, Any]]) -> int:
    """Compares all of CHATS with all options.

    Returns:
        How many have a prompt.
    """
    num_prompts = 0
    for (name, messages), each in itertools.product(CHATS.items(), options):
        wanted = expected(tokenizer, messages, each)
        assert found(template, messages, each) == wanted, (name, each, wanted)
        num_prompts += wanted is not FAILED
    return num_prompts


Opened = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Transformers' tokenizer and our template, of a real model or of one with a template of TEMPLATES; once each."""

    @cache
    def opened(name: str, more: str = "") -> tuple[Any, Any]:
        folder = tmp_path_factory.mktemp("opened")
        model = make_chat_model(folder, TEMPLATES[name] + more) if name in TEMPLATES else real_tokenizer(name)
        return AutoTokenizer.from_pretrained(model), open_tokenizer(model, str(folder)).chat_template

    return opened


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_and_options(name: str, opened: Opened) -> None:
    assert (num_alike(*opened(name), OPTIONS) == 0) == (name in NEVER)


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3", "gptoss", "llama2", "llama3", "llama3_1", "qwen3"])
def test_real_templates(name: str, opened: Opened) -> None:
    """Some come without one: a template that callers bring has the special tokens all the same."""
    tokenizer, template = opened(name)
    assert template is not None
    options = OPTIONS if template.text else [{**each, "chat_template": TEMPLATES["trimmed"]} for each in OPTIONS]
    assert num_alike(tokenizer, template, options) > 100


@pytest.mark.parametrize(
    ("name", "reads_parts"), [("gemma3", True), ("llama3", False), ("llama3_1", False), ("qwen3", False)]
)
def test_content_in_parts_of_a_real_model(name: str, reads_parts: bool, opened: Opened) -> None:
    assert_parts_are_read(*opened(name), reads_parts)


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - NEVER - {"scalars"}))
def test_content_in_parts(name: str, opened: Opened) -> None:
    assert_parts_are_read(*opened(name), name == "parts")


def assert_parts_are_read(tokenizer: Any, template: Any, reads_parts: bool) -> None:
    """Callers of the chat API give a text in parts to any model. A template that reads parts gets them, another one
    text."""
    parts = [{"type": "text", "text": "One. "}, {"type": "text", "text": "Two, "}]
    for content in (parts, parts[:1], []):
        chat = parse_body(CHAT, {"messages": [{"role": "user", "content": content}]}).prompt
        assert isinstance(chat, Chat)
        text = "\n".join(part["text"] for part in content)
        seen = [{"role": "user", "content": content if reads_parts else text}]
        wanted = expected(tokenizer, seen, {"add_generation_prompt": True})
        assert wanted is not FAILED and render(chat, template) == wanted


USES = {"tool_use": TEMPLATES["json"], "rag": TEMPLATES["keys"], "": TEMPLATES["lower"]}


@pytest.mark.parametrize("where", ["list", "dict", "files", "files over list"])
@pytest.mark.parametrize(
    "templates",
    [{"default": TEMPLATES["asks"], **USES}, USES, {"default": TEMPLATES["asks"]}, {"tool_use": TEMPLATES["asks"]}, {}],
    ids=lambda templates: "+".join(templates),
)
def test_which_template(templates: dict[str, str], where: str, tmp_path: Path) -> None:
    """By name, "tool_use" for tools, "default"; from all places where Transformers looks."""
    model = make_chat_model(tmp_path, None)
    if where == "dict":
        set_in_config(model, templates)
    if where.endswith("list"):
        listed = templates if where == "list" else {"rag": "not this one"}
        set_in_config(model, [{"name": name, "template": text} for name, text in listed.items()])
    if where.startswith("files"):
        (model / "additional_chat_templates").mkdir()
        for name, text in templates.items():
            path = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
            (model / path).write_text(text, encoding="utf-8")
    tokenizer, template = AutoTokenizer.from_pretrained(model), open_tokenizer(model, str(tmp_path)).chat_template
    options: list[dict[str, Any]] = [{}, {"tools": None}, {"tools": []}, {"tools": [TOOL]}]
    names = [None, "default", "tool_use", "rag", "", "nothing", "{{ bos_token }}{{ messages | length }}"]
    each = [{**one, "chat_template": name} for one in options for name in names]
    assert num_alike(tokenizer, template, [{**one, "add_generation_prompt": True} for one in each]) > 0


def test_special_tokens_of_the_models_type(tmp_path: Path) -> None:
    """Transformers knows some where there is nothing but a tokenizer.json."""
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(MODEL / "tokenizer.json", model)
    (model / "config.json").write_text('{"model_type": "qwen3"}', encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.special_tokens_map
    opened = open_tokenizer(model, str(tmp_path))
    assert num_alike(tokenizer, opened.chat_template, [{"chat_template": TEMPLATES["trimmed"]}]) > 0
    (model / "chat_template.jinja").write_text(TEMPLATES["trimmed"], encoding="utf-8")
    opened = open_tokenizer(model, str(tmp_path))
    assert num_alike(AutoTokenizer.from_pretrained(model), opened.chat_template, [{}]) > 0


class Text(str):
    def __str__(self) -> str:
        return "something else"


class Role(enum.StrEnum):
    USER = "user"


class Size(enum.IntEnum):
    SMALL = 1


@dataclasses.dataclass
class Part:
    type: str
    text: str | None = None


class Call(pydantic.BaseModel):
    name: str = "f"
    arguments: dict[str, Any] | None = None


class Unreadable:
    @property
    def model_dump(self) -> None:
        raise RuntimeError("no")


OBJECTS = [
    Text("x"), Role.USER, Size.SMALL, UserDict({"a": UserDict({"b": None})}), (1, (2, [3])), Part("text"), Part, Call(),
    Call(arguments={"x": Part("y")}), np.float64(0.1), np.float32(0.1), np.int64(7), np.bool_(False), np.str_("s"),
    np.zeros(2), b"bytes", {1, 2}, object, range(3), 1e300, float("nan"), 10**30, True, Unreadable(), "\U0001f600",
    {(1, 2): 3, Role.USER: 4}, {}, list(range(3)), iter([1]),
]  # fmt: skip


@pytest.mark.parametrize("value", OBJECTS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ["keys", "parts", "json"])
def test_objects_of_callers(name: str, value: Any, opened: Opened) -> None:
    """A template sees plain data alone."""
    tokenizer, template = opened(name, "{{ x }}{{ x is mapping }}{{ x is sequence }}{{ x.name }}")
    chats = [[{"role": "user", "content": value}], [{"role": value, "content": [value]}], [value]]
    for messages in chats:
        for options in ({}, {"x": value}, {"documents": [{"text": value}], "tools": [{"x": value}]}):
            wanted = expected(tokenizer, messages, options)
            assert found(template, messages, options) == wanted

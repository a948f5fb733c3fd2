"""Conversations through the engine: the same tokens as of the prompt that Transformers makes of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from flexgen_lite import Client, FlexGenLite, SamplingParams
from flexgen_lite.batch.result_file import ResultWriter
from flexgen_lite.batch.run import BatchRun
from flexgen_lite.chat.template import ChatError
from flexgen_lite.demo.pretrained import MODEL
from tests.chat_model import make_chat_model

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'robot' %}{{ raise_exception('no robots') }}"
    "{% endif %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WITH_TOOLS = (
    "{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% for message in messages %}{{ message.role }}: "
    "{% if message.content is defined %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}\n{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "look_up_in_book", "parameters": {"type": "object"}}}
TALKS = [[{"role": "user", "content": text}] for text in ("john smith, 3 May 1990", "+49 30 123456", "Ann")]
PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("chat"), TEMPLATE)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[FlexGenLite]:
    with FlexGenLite(model, dtype="float32", ram="2GiB", attention_threads=1) as engine:
        yield engine


def test_the_tokens_are_those_of_the_prompt_that_transformers_makes(engine: FlexGenLite, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    found = engine.chat(TALKS, PARAMS)
    for talk, completion in zip(TALKS, found, strict=True):
        prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert completion.token_ids == engine.generate(prompt, PARAMS).token_ids
        assert completion.num_prompt_tokens == len(prompt), "special tokens come from the template alone"
    one = engine.chat(TALKS[0], PARAMS)
    assert one.token_ids == found[0].token_ids
    assert engine.chat(TALKS[0], PARAMS, chat_template="x").token_ids != one.token_ids


def test_chat_lines_of_a_batch(engine: FlexGenLite, tmp_path: Path) -> None:
    bodies = [
        {"messages": TALKS[0], "max_tokens": 5, "temperature": 0, "ignore_eos": True},
        {"messages": TALKS[0], "max_completion_tokens": 5, "temperature": 0, "ignore_eos": True, "logprobs": True,
         "top_logprobs": 2},
        {"messages": [{"role": "robot", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"content": "x"}]},
        {"messages": TALKS[0], "prompt": "x"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": TALKS[0][0]["content"]}]}],
         "max_tokens": 5, "temperature": 0, "ignore_eos": True},
    ]  # fmt: skip
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n, body in enumerate(bodies)
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with Client(engine.endpoint) as client:
        for _ in range(2):  # the second time there is nothing to do
            with ResultWriter(out) as results:
                BatchRun(client, source, results).run(lambda _: None, 1.0)
    rows = {row["custom_id"]: row for row in map(json.loads, out.read_text(encoding="utf-8").splitlines())}
    assert len(rows) == 7
    bodies = {key: row["response"]["body"] for key, row in rows.items() if row["error"] is None}
    assert bodies.keys() == {"0", "1", "6"}
    choice = bodies["0"]["choices"][0]
    assert bodies["0"]["object"] == "chat.completion" and bodies["0"]["id"].startswith("chatcmpl-")
    assert choice["message"] == {"role": "assistant", "content": engine.chat(TALKS[0], SamplingParams(
        max_tokens=5, temperature=0.0, ignore_eos=True)).text}  # fmt: skip
    assert bodies["6"]["choices"][0]["message"] == choice["message"]
    content = bodies["1"]["choices"][0]["logprobs"]["content"]
    assert len(content) == 5 and all(len(entry["top_logprobs"]) == 2 for entry in content)
    errors = {key: row["error"]["message"] for key, row in rows.items() if row["error"] is not None}
    assert "no robots" in errors["2"]
    assert "has content of the type" in errors["3"] and "only text can be given" in errors["3"]
    assert "body.messages[0] is not an object with a role" in errors["4"]
    assert "body.prompt: not supported" in errors["5"]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with templates for several uses, one of which is broken."""
    model = make_chat_model(tmp_path_factory.mktemp("several"), TEMPLATE)
    (model / "additional_chat_templates").mkdir()
    for name, text in (("tool_use", WITH_TOOLS), ("rag", "{% if %}"), ("short", "{{ messages[0].content }}")):
        (model / "additional_chat_templates" / f"{name}.jinja").write_text(text, encoding="utf-8")
    return model


def test_templates_for_several_uses(several: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The one for tools where there are tools; by name, also where programs are not taken; a broken one is said at
    launch and in what it is asked for, and harms nothing else."""
    tokenizer = AutoTokenizer.from_pretrained(several)
    called = [
        *TALKS[0],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "look_up_in_book", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "Ann"},
    ]
    with (
        caplog.at_level(logging.WARNING),
        FlexGenLite(several, dtype="float32", ram="2GiB", attention_threads=1) as engine,
    ):
        assert "the model's chat template 'rag' has a syntax error in line 1: " in caplog.text
        found = []
        for options in ({}, {"tools": [TOOL]}, {"chat_template": "short"}, {"chat_template": "tool_use", "tools": []}):
            prompt = tokenizer.apply_chat_template(called, add_generation_prompt=True, return_dict=False, **options)
            completion = engine.chat(called, PARAMS, **options)
            assert completion.num_prompt_tokens == len(prompt)
            assert completion.token_ids == engine.generate(prompt, PARAMS).token_ids
            found.append(completion.num_prompt_tokens)
        assert len(set(found)) == 4
        with pytest.raises(ChatError, match="the model's chat template 'rag' has a syntax error in line 1: "):
            engine.chat(called, PARAMS, chat_template="rag")
        asked = {"messages": called, "max_tokens": 3, "ignore_eos": True}
        bodies = [
            {**asked, "tools": [TOOL]},
            {**asked, "chat_template": "short"},
            {**asked, "chat_template": "rag"},
            {**asked, "chat_template": "{{ messages }}"},
            {**asked, "chat_template_kwargs": {"chat_template": "{{ messages }}"}},
        ]
        rows = answers(engine, bodies, tmp_path, own_templates=False)
    usages = [row["response"]["body"]["usage"]["prompt_tokens"] for row in rows[:2]]
    assert usages == found[1:3]
    errors = [row["error"]["message"] for row in rows[2:]]
    assert "the model's chat template 'rag' has a syntax error in line 1" in errors[0]
    assert "chat_template is a program, which is not taken here" in errors[1]
    assert "chat_template_kwargs has chat_template" in errors[2]


def answers(engine: FlexGenLite, bodies: list[dict[str, Any]], folder: Path, *, own_templates: bool) -> list[Any]:
    """The rows of a batch file with these chat requests, in their order."""
    source, out = folder / "in.jsonl", folder / "out.jsonl"
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for n, body in enumerate(bodies)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    with Client(engine.endpoint) as client, ResultWriter(out) as results:
        BatchRun(client, source, results, own_templates=own_templates).run(lambda _: None, 1.0)
    rows = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    return sorted(rows, key=lambda row: int(row["custom_id"]))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content }", "the model's chat template has a syntax error in line 1: unexpected '}'"),
        (b"\xe4", "the model's chat template cannot be read: chat_template.jinja: UnicodeDecodeError"),
    ],
)
def test_a_broken_template_is_said_at_launch(
    template: str | bytes, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_chat_model(tmp_path, None)
    (model / "chat_template.jinja").write_bytes(template if isinstance(template, bytes) else template.encode())
    with (
        caplog.at_level(logging.WARNING),
        FlexGenLite(model, dtype="float32", ram="2GiB", attention_threads=1) as engine,
    ):
        assert f"warning: {words}" in caplog.text and "completions are served" in caplog.text
        with pytest.raises(ChatError, match=words):
            engine.chat(TALKS[0], PARAMS)
        text = TALKS[0][0]["content"]
        own = engine.chat(TALKS[0], PARAMS, chat_template="{{ bos_token }}{{ messages[0].content }}")
        assert own.text == engine.generate(text, PARAMS).text != ""
        with pytest.raises(ChatError, match=r"^chat_template has a syntax error in line 1"):
            engine.chat(TALKS[0], PARAMS, chat_template="{% if %}")


def test_a_model_without_a_template_says_so() -> None:
    with FlexGenLite(MODEL, dtype="float32", ram="2GiB") as engine, pytest.raises(ChatError, match="no chat template"):
        engine.chat(TALKS[0])


def test_what_the_template_refuses_ends_the_job(engine: FlexGenLite) -> None:
    with pytest.raises(ChatError, match="no robots"):
        engine.chat([TALKS[0], [{"role": "robot", "content": "x"}]], PARAMS)
    assert engine.chat(TALKS[0], PARAMS).error is None

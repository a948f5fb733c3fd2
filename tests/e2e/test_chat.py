"""Conversations through the engine: the same tokens as of the prompt that Transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from flexgen_lite import Client, FlexGenLite, SamplingParams
from flexgen_lite.batch_run import BatchRun
from flexgen_lite.chat_template import ChatError
from flexgen_lite.demo.run import MODEL
from flexgen_lite.result_file import ResultWriter
from tests.chat_model import make_chat_model

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'robot' %}{{ raise_exception('no robots') }}"
    "{% endif %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
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
    assert "another type than text" in errors["3"]
    assert "body.messages[0] is not an object with a role" in errors["4"]
    assert "body.prompt: not supported" in errors["5"]


def test_a_model_without_a_template_says_so() -> None:
    with FlexGenLite(MODEL, dtype="float32", ram="2GiB") as engine, pytest.raises(ChatError, match="no chat template"):
        engine.chat(TALKS[0])


def test_what_the_template_refuses_ends_the_job(engine: FlexGenLite) -> None:
    with pytest.raises(ChatError, match="no robots"):
        engine.chat([TALKS[0], [{"role": "robot", "content": "x"}]], PARAMS)
    assert engine.chat(TALKS[0], PARAMS).error is None

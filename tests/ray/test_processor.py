"""Datasets through engines in actors of a real, small Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import ray.data

from flexgen_lite.config.problems import ConfigError
from flexgen_lite.ray.processor import build_processor
from tests.ray.pipelines import by_id, config_of, coordinators
from tests.tiny_models import ragged_prompts, reference_tokens

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("no_engines")]
GREEDY = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}


def test_two_actors_give_the_tokens_of_transformers(model: Path) -> None:
    """One block of many rows goes to both of them; columns that are none of ours stay as they are."""
    prompts = ragged_prompts(60, 40)
    table = pa.table({"id": range(60), "tokenized_prompt": prompts, "kept": [{"a": [n, None]} for n in range(60)]})
    dataset = ray.data.from_arrow(table).map(lambda row: {**row, "sampling_params": GREEDY})
    rows, engines = [], set()
    for row in build_processor(config_of(model, concurrency=2))(dataset).iter_rows():
        rows.append(row)
        engines |= {process.pid for process in coordinators()}
    found = by_id(rows)
    assert [found[number]["generated_tokens"] for number in range(60)] == reference_tokens(model, prompts, 6)
    assert [found[number]["kept"] for number in range(60)] == table["kept"].to_pylist()
    assert {row["__inference_error__"] for row in rows} == {""}
    assert {row["finish_reason"] for row in rows} == {"length"}
    assert all(row["num_input_tokens"] == len(prompts[row["id"]]) for row in rows)
    assert all(row["num_generated_tokens"] == 6 for row in rows)
    assert len(engines) == 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "the row has no prompt"),
    ({"prompt": 17}, "is an int: give a text"),
    ({"prompt": "x" * 600}, "tokens"),
    ({"sampling_params": {"temperature": -1.0}}, "temperature=-1.0 is not allowed"),
    ({"sampling_params": {"best_of": 3}}, "best_of: not supported"),
    ({"sampling_params": "greedy"}, "sampling_params is a str"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]}, "only text can be given"),
    ({"fails": True}, "preprocess: ZeroDivisionError"),
]  # fmt: skip


def test_bad_rows_come_back_with_their_errors_and_the_others_with_their_answers(text_model: Path) -> None:
    items = [{"id": number, "text": f"record {number}"} for number in range(40)]
    bad = {5 * number + 2: change for number, (change, _) in enumerate(BAD)}

    def prepare(row: dict[str, Any]) -> dict[str, Any]:
        change = bad.get(row["id"], {})
        1 // (0 if "fails" in change else 1)
        return {"prompt": row["text"], "sampling_params": {"max_tokens": 3, "temperature": 0.0}, **change}

    def finish(row: dict[str, Any]) -> dict[str, Any]:
        1 // (0 if row["id"] == 39 else 1)
        return {"id": row["id"], "answer": row["generated_text"], "length": row["num_generated_tokens"]}

    processor = build_processor(config_of(text_model), prepare, finish)
    found = by_id(processor(ray.data.from_items(items)).take_all())
    assert len(found) == 40
    assert "postprocess: ZeroDivisionError" in found[39]["__inference_error__"]
    assert found[39]["generated_text"], "what came of it is not lost"
    for number, (_, told) in zip(bad, BAD, strict=True):
        assert told in found[number]["__inference_error__"], (number, found[number])
    good = set(range(39)) - set(bad)
    assert all(found[number]["__inference_error__"] == "" for number in good)
    assert all(found[number]["length"] == 3 for number in good)


def test_chats_go_through_the_models_template(text_model: Path) -> None:
    words = [f"word{number}" for number in range(10)]
    dataset = ray.data.from_items([{"id": number, "word": word} for number, word in enumerate(words)])
    params = {"max_tokens": 4, "temperature": 0.0}

    def as_chat(row: dict[str, Any]) -> dict[str, Any]:
        messages = [{"role": "system", "content": "read: "}, {"role": "user", "content": row["word"]}]
        return {"messages": messages, "sampling_params": params}

    def as_text(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": f"read: {row['word']} =>", "sampling_params": params}

    chats = by_id(build_processor(config_of(text_model), as_chat)(dataset).take_all())
    texts = by_id(build_processor(config_of(text_model), as_text)(dataset).take_all())
    assert all(not row["__inference_error__"] for row in [*chats.values(), *texts.values()])
    # the template's text has its special tokens, of which this one has none; the tokenizer puts one before a prompt
    assert [chats[number]["num_input_tokens"] for number in range(10)] == [
        texts[number]["num_input_tokens"] - 1 for number in range(10)
    ]


def test_one_processor_behind_another(text_model: Path) -> None:
    """A row that has failed in the first one keeps its error, and is not asked again."""
    params = {"max_tokens": 3, "temperature": 0.0}

    def first(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": None if row["id"] == 3 else "a", "sampling_params": params}

    def second(row: dict[str, Any]) -> dict[str, Any]:
        return {"prompt": f"{row['first']}b", "sampling_params": params | ({"logprobs": 1} if row["id"] == 2 else {})}

    one = build_processor(
        config_of(text_model, num_cpus=1), first, lambda row: {"id": row["id"], "first": row["generated_text"]}
    )
    other = build_processor(
        config_of(text_model, num_cpus=1),
        second,
        lambda row: {"id": row["id"], "second": row["generated_text"], "logprobs": row["logprobs"]},
    )
    found = by_id(other(one(ray.data.range(20))).take_all())
    assert "has no prompt" in found[3]["__inference_error__"] and found[3]["second"] is None
    good = [row for number, row in found.items() if number != 3]
    assert len(good) == 19 and {row["__inference_error__"] for row in good} == {""}
    assert [row["id"] for row in good if row["logprobs"] is not None] == [2], "the column is there in all batches"


def test_two_that_would_wait_for_each_other_are_refused(text_model: Path) -> None:
    one, other = (build_processor(config_of(text_model), lambda row: {"prompt": "a"}) for _ in range(2))
    between = one(ray.data.range(20)).map(lambda row: row)
    with pytest.raises(ConfigError, match="give num_cpus to both, and ram in engine_kwargs, or materialize"):
        other(between)
    assert len(other(one(ray.data.range(4)).materialize()).take_all()) == 4


def test_messages_in_arrays(text_model: Path) -> None:
    """As steps on batches make them."""
    chats = [[{"role": "user", "content": "word"}] * (number % 2 + 1) for number in range(8)]
    dataset = ray.data.from_items([{"id": number, "messages": chat} for number, chat in enumerate(chats)])
    found = by_id(build_processor(config_of(text_model))(dataset.map_batches(lambda batch: batch)).take_all())
    assert {row["__inference_error__"] for row in found.values()} == {""}
    assert found[1]["num_input_tokens"] > found[0]["num_input_tokens"] > 0


def test_a_broken_configuration_ends_the_job_with_the_engines_words(tmp_path: Path) -> None:
    dataset = ray.data.from_items([{"prompt": "a"}])
    with pytest.raises(Exception, match="there-is-no-model"):
        build_processor(config_of(tmp_path / "there-is-no-model"))(dataset).take_all()


def test_one_bad_row_ends_the_job_where_that_is_wanted(text_model: Path) -> None:
    dataset = ray.data.from_items([{"prompt": "fine"}, {"prompt": ""}, {"prompt": None}])
    config = config_of(text_model, should_continue_on_error=False)
    with pytest.raises(Exception, match="row 2 of a batch of 3 failed: ValueError: the row has no prompt"):
        build_processor(config)(dataset).take_all()

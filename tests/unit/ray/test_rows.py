"""What rows ask of the engine, and what is told of those that ask for nothing that could be done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flexgen_lite.chat.template import Chat
from flexgen_lite.client.completion import Prompt
from flexgen_lite.client.request import Request
from flexgen_lite.client.sampling_params import CHAT_PARAMS, GREEDY, SamplingParams
from flexgen_lite.ray.rows import RowReader, params_of


def request_of(asked: Prompt | Chat, params: SamplingParams) -> Request:
    if isinstance(asked, Chat):
        text = "|".join(f"{message['role']}:{message['content']}" for message in asked.messages)
        return Request(f"{text}|{asked.add_generation_prompt}|{asked.continue_final_message}", params)
    return Request(asked, params)


def no_seed() -> int:
    raise AssertionError("no seed is wanted")


def read(row: dict[str, Any], reader: RowReader | None = None, seed: int | None = None) -> Request:
    reader = reader or RowReader(request_of)
    return reader.request(row, no_seed if seed is None else lambda: seed)


USER = {"role": "user", "content": "hello"}


def test_a_prompt_is_greedy_and_a_chat_longer() -> None:
    assert read({"prompt": "text"}) == Request("text", GREEDY)
    assert read({"prompt": [1, 2], "sampling_params": None}) == Request([1, 2], GREEDY)
    assert read({"messages": [USER], "prompt": "not this"}) == Request("user:hello|True|False", CHAT_PARAMS)


def test_tokens_go_before_the_text_they_are_made_of() -> None:
    assert read({"prompt": "text", "tokenized_prompt": [3, 4]}).prompt == [3, 4]


def test_what_the_assistant_has_begun_goes_on() -> None:
    begun = [USER, {"role": "assistant", "content": "well"}]
    assert read({"messages": begun}).prompt == "user:hello|assistant:well|False|True"


def test_messages_are_left_alone_where_no_template_is_wanted() -> None:
    reader = RowReader(request_of, applies_template=False)
    assert read({"messages": [USER], "prompt": "text"}, reader).prompt == "text"


def test_keys_of_other_rows_are_null_in_a_table() -> None:
    params = params_of({"max_tokens": 5, "temperature": 0.0, "unheard": None, "logit_bias": {"7": 1.5, "9": None}})
    assert params == SamplingParams(max_tokens=5, temperature=0.0, logit_bias={7: 1.5})


def test_only_what_is_drawn_without_a_seed_gets_one() -> None:
    assert read({"prompt": "a", "sampling_params": {"temperature": 0.7}}, seed=5).params.seed == 5
    assert read({"prompt": "a", "sampling_params": {"temperature": 0.7, "seed": 3}}).params.seed == 3
    assert read({"prompt": "a", "sampling_params": {"temperature": 0}}).params.seed is None


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({}, "the row has no prompt: give prompt, tokenized_prompt or messages"),
        ({"prompt": None}, "has no prompt"),
        ({"prompt": 3.5}, "a float: give a text or a list of token ids"),
        ({"prompt": [1, -2]}, "has -2 among its token ids"),
        ({"messages": "hello"}, "messages is a str: give a list"),
        ({"messages": []}, "messages is empty: give at least one message"),
        ({"messages": np.array([])}, "messages is empty: give at least one message"),
        ({"tokenized_prompt": "abc"}, "tokenized_prompt is a text: give token ids, or the text as prompt"),
        ({"prompt": "a", "sampling_params": 7}, "sampling_params is an int: give a dict"),
        ({"prompt": "a", "sampling_params": {"best_of": 2}}, "best_of: not supported; supported are"),
        ({"prompt": "a", "sampling_params": {"max_tokens": -1}}, "max_tokens=-1 is not allowed"),
        ({"prompt": "a", "sampling_params": {"temperature": "0"}}, "temperature='0' is not allowed"),
        ({"prompt": "a", "sampling_params": {"temperature": 0.0, "n": 2}}, "n=2: a row has room for one answer"),
        ({"prompt": "a", "sampling_params": {"logit_bias": {"x": 1.0}}}, "logit_bias='x' is not allowed"),
    ],
)
def test_a_row_that_asks_for_nothing(row: dict[str, Any], told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told.replace("(", r"\(")):
        read(row)


def test_arrays_are_lists() -> None:
    parts = np.array([{"type": "text", "text": "hello"}], dtype=object)
    messages = np.array([USER, {"role": "user", "content": parts}], dtype=object)
    seen = []
    RowReader(lambda asked, params: seen.append((asked, params)) or Request("p", params)).request(  # type: ignore[func-returns-value, arg-type]
        {
            "messages": messages,
            "sampling_params": {"stop": np.array(["e"]), "stop_token_ids": np.array([5]), "top_k": np.int64(2)},
        },
        lambda: 1,
    )
    ((chat, params),) = seen
    assert isinstance(chat, Chat) and chat.messages == [
        USER,
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    ]
    assert (params.stop, params.stop_token_ids, params.top_k) == (("e",), (5,), 2)

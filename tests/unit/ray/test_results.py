"""Completions as columns of a table."""

from __future__ import annotations

import pyarrow as pa

from flexgen_lite.client.completion import Completion, CompletionOutput, Logprob
from flexgen_lite.ray.results import with_results

DONE = Completion(0, "p", [CompletionOutput("text", [5, 6], "length")], 3)
FAILED = Completion(1, "p", [], 9, error="too long")
NEW = ["generated_text", "generated_tokens", "num_input_tokens", "num_generated_tokens", "finish_reason"]
LOGPROBS = {"logprobs": None, "prompt_logprobs": None}


def test_each_row_has_what_came_of_it() -> None:
    table = with_results(pa.table({"id": [1, 2, 3]}), [DONE, FAILED, "no prompt"])
    assert table.column_names == ["id", *NEW, "__inference_error__", *LOGPROBS]
    assert table.to_pylist() == [
        row | LOGPROBS for row in [
        {"id": 1, "generated_text": "text", "generated_tokens": [5, 6], "num_input_tokens": 3,
         "num_generated_tokens": 2, "finish_reason": "length", "__inference_error__": ""},
        {"id": 2, "generated_text": "", "generated_tokens": [], "num_input_tokens": 9,
         "num_generated_tokens": 0, "finish_reason": "error", "__inference_error__": "too long"},
        {"id": 3, "generated_text": "", "generated_tokens": [], "num_input_tokens": 0,
         "num_generated_tokens": 0, "finish_reason": "error", "__inference_error__": "no prompt"},
    ]]  # fmt: skip


def test_types_do_not_depend_on_what_is_in_the_columns() -> None:
    asked = Completion(0, "p", [CompletionOutput("t", [7], "stop", [{7: Logprob(-0.5, 1, "x")}])], 2)
    told = with_results(pa.table({"id": [0]}), [asked])
    one = with_results(pa.table({"id": [1]}), [DONE])
    other = with_results(pa.table({"id": [2]}), ["no prompt"])
    assert told.schema == one.schema == other.schema
    assert pa.concat_tables([one, other]).num_rows == 2


def test_a_column_of_the_same_name_gives_way() -> None:
    table = with_results(pa.table({"generated_text": [1], "id": [2]}), [DONE])
    assert table.column_names[:2] == ["generated_text", "id"]
    assert table["generated_text"].to_pylist() == ["text"]


def test_logprobs_of_rows_that_asked_for_them() -> None:
    first, second = Logprob(-0.5, 2, "x"), Logprob(-0.25, 1, "y")
    output = CompletionOutput("t", [7], "stop", [{7: first, 8: second}])
    told = Completion(0, "p", [output], 2, prompt_logprobs=[None, {4: second}])
    row, other = with_results(pa.table({"id": [1, 2]}), [told, DONE]).to_pylist()
    assert row["logprobs"] == [
        [
            {"token_id": 7, "logprob": -0.5, "rank": 2, "decoded_token": "x"},
            {"token_id": 8, "logprob": -0.25, "rank": 1, "decoded_token": "y"},
        ]
    ]
    assert row["prompt_logprobs"] == [None, [{"token_id": 4, "logprob": -0.25, "rank": 1, "decoded_token": "y"}]]
    assert other["logprobs"] is None and other["prompt_logprobs"] is None

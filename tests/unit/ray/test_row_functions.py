"""Functions of the user's before and after the engine."""

from __future__ import annotations

import pytest

from flexgen_lite.ray.row_functions import postprocessing, preprocessing
from flexgen_lite.ray.rows import ASKED, pack, unpack


def test_preprocess_adds_to_the_row_and_asks_in_one_column() -> None:
    row = {"id": 1, "text": "a", "sampling_params": {"seed": 1}}
    made = preprocessing(lambda row: {"prompt": row.pop("text") + "!", "more": 2}, True)(row)
    assert unpack(made.pop(ASKED)) == {"prompt": "a!", "sampling_params": {"seed": 1}}
    assert made == row | {"more": 2, "__inference_error__": ""}


def test_a_row_that_preprocess_fails_on_is_told() -> None:
    made = preprocessing(lambda row: {"prompt": row["missing"]}, True)({"id": 1})
    assert unpack(made.pop(ASKED)) == {}
    assert made == {"id": 1, "__inference_error__": "preprocess: KeyError: 'missing'"}
    nothing = preprocessing(lambda row: None, True)({"id": 1})  # type: ignore[arg-type, return-value]
    assert nothing["__inference_error__"] == (
        "preprocess: TypeError: what it returned is None: return a dict of columns"
    )
    with pytest.raises(KeyError):
        preprocessing(lambda row: {"prompt": row["missing"]}, False)({"id": 1})


def test_a_prompt_that_is_made_goes_before_one_that_was_there() -> None:
    row = {"messages": [1], "tokenized_prompt": [2], "sampling_params": {"seed": 1}}
    made = preprocessing(lambda row: {"prompt": "a"}, True)(row)
    assert unpack(made[ASKED]) == {"prompt": "a", "sampling_params": {"seed": 1}}
    made = preprocessing(lambda row: {"prompt": None}, True)(row)
    assert unpack(made[ASKED]) == {**row, "prompt": None}


def test_a_row_that_has_failed_before_stays_as_it_is() -> None:
    failed = {"id": 1, "first": None, "__inference_error__": "too long"}
    made = preprocessing(lambda row: {"prompt": f"{row['first']}"}, True)(failed)
    assert unpack(made.pop(ASKED)) == {} and made == failed
    asked = preprocessing(lambda row: {"prompt": "a"}, True)({"id": 1, "__inference_error__": float("nan")})
    assert asked["__inference_error__"] == "", "pandas has it for nothing"


def test_postprocess_sees_what_was_asked() -> None:
    post = postprocessing(lambda row: {"both": [row["prompt"], row["generated_text"]]}, True)
    done = post({"generated_text": "x", ASKED: pack({"prompt": "a"}), "__inference_error__": ""})
    assert done == {"both": ["a", "x"], "__inference_error__": ""}
    failed = post({"id": 3, ASKED: pack({"prompt": 7}), "__inference_error__": "no prompt"})
    assert failed == {"id": 3, "__inference_error__": "no prompt"}


def test_postprocess_sees_no_row_that_failed() -> None:
    post = postprocessing(lambda row: {"answer": row["generated_text"].upper()}, True)
    failed = {"id": 1, "__inference_error__": "too long"}
    assert post(failed) == failed
    assert post({"generated_text": "x", "__inference_error__": ""}) == {"answer": "X", "__inference_error__": ""}
    assert post({"id": 2}) == {"id": 2, "__inference_error__": "postprocess: KeyError: 'generated_text'"}


def test_the_job_ends_where_that_is_wanted() -> None:
    assert postprocessing(lambda row: {"answer": 1}, False)({"id": 1}) == {"answer": 1}
    with pytest.raises(KeyError):
        postprocessing(lambda row: {"answer": row["missing"]}, False)({"id": 1})

"""What `python -m benchmarks.quality` cuts, reckons and prints."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import __main__ as command
from benchmarks.quality import engine, peers
from benchmarks.quality.figures import Scored, alike, figures, perplexity
from benchmarks.quality.report import Row, table
from benchmarks.quality.settings import REFERENCE, SETTINGS, Setting, parse_options, parse_setting
from benchmarks.quality.task import Task, cut, excerpts, is_demo_model, prose_task, records_task
from flexgen_lite.demo.pretrained import MODEL


class Characters:
    """A tokenizer with a token for each character."""

    bos_token_id: int | None = 1
    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(character) for character in text]}


def test_windows_begin_with_the_beginning_of_sequence_and_score_each_token_once() -> None:
    ids = list(range(10, 20))
    windows = cut(ids, 5, [1])
    assert windows == [[1, 10, 11, 12, 13], [1, 14, 15, 16, 17], [1, 18, 19]]
    assert [token for window in windows for token in window[1:]] == ids


def test_without_a_beginning_of_sequence_the_first_token_of_a_window_is_not_scored() -> None:
    assert cut([1, 2, 3, 4, 5], 2, []) == [[1, 2], [3, 4]]  # the last one would score nothing


def test_prompts_are_spread_from_the_beginning_to_the_end() -> None:
    assert excerpts(list(range(10)), 3, 4, [99]) == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 7, 8, 9]]
    assert excerpts(list(range(10)), 1, 4, []) == [[0, 1, 2, 3]]


def test_a_task_from_a_text() -> None:
    task = prose_task(Characters(), "a text", "abcdefghij", 8, 5, 2, 3, 7)
    assert task.windows == [[1, *b"abcd"], [1, *b"efgh"]]
    assert task.prompts == [[1, *b"ab"], [1, *b"gh"]]
    assert (task.num_scored, task.max_tokens, task.ignore_eos) == (8, 7, True)
    with pytest.raises(ValueError, match="a text has 2 tokens: give a text of more than the 5 of a prompt"):
        prose_task(Characters(), "a text", "ab", 8, 5, 2, 5, 7)


def test_a_task_from_the_records_of_the_demonstration() -> None:
    task = records_task(Characters(), 300, 2, 7)
    assert task.num_scored >= 300 > task.num_scored - len(task.windows[-1])
    assert len(task.prompts) == 2 and not task.ignore_eos
    for window, prompt in zip(task.windows, task.prompts, strict=False):
        assert window[: len(prompt)] == prompt and prompt[0] == 1 and window[-1] == 2


def test_only_the_demonstrations_model_gets_them(tmp_path: Path) -> None:
    assert is_demo_model(str(MODEL)) and not is_demo_model(str(tmp_path))


def test_settings_by_name_and_by_their_options() -> None:
    assert parse_setting("int4") is SETTINGS["int4"]
    own = parse_setting("mine:kv_dtype=int8,max_sequences=4,prefix_caching=false")
    assert own == Setting(
        "mine", "mine", {"dtype": "bfloat16", "kv_dtype": "int8", "max_sequences": 4, "prefix_caching": False}
    )
    assert parse_options(["ram=4GiB", "dtype=float32"]) == {"ram": "4GiB", "dtype": "float32"}
    for wrong in ("int5", "mine:", "mine:kv_dtype", ":kv_dtype=int8"):
        with pytest.raises(ValueError, match="give one of float32, int8"):
            parse_setting(wrong)


def test_the_reference_is_bfloat16_and_the_others_say_so() -> None:
    assert REFERENCE.options == {"dtype": "bfloat16"}
    assert [name for name, one in SETTINGS.items() if one.options["dtype"] != "bfloat16"] == ["float32"]


LOGPROBS = [[math.log(0.5), math.log(0.25)], [math.log(0.5)]]
SCORED = Scored(LOGPROBS, [[-1.0, -2.0]], [[True, True]], [[5, 6, 7, 8]])


def test_perplexity_is_the_inverse_of_the_mean_probability() -> None:
    assert perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4.0)


def test_figures_of_the_reference() -> None:
    found = figures(SCORED, None)
    assert found.perplexity == pytest.approx(2 ** (4 / 3))
    assert (found.change, found.error, found.difference, found.same) == (None, None, None, None)
    assert found.likeliest == 1.0


def test_figures_against_the_reference() -> None:
    worse = [[value - math.log(1.1) for value in row] for row in LOGPROBS]
    found = figures(Scored(worse, [[-1.5, -1.75]], [[True, False]], [[5, 6, 9, 8]]), SCORED)
    assert found.change == pytest.approx(0.1)  # each token lost the same: nothing is uncertain
    assert found.error == pytest.approx(0.0, abs=1e-9)
    assert (found.likeliest, found.difference, found.same) == (0.5, pytest.approx(0.375), 0.5)


def test_the_error_is_that_of_the_differences_token_by_token() -> None:
    other = [[LOGPROBS[0][0] - 0.3, LOGPROBS[0][1]], [LOGPROBS[1][0]]]
    found = figures(Scored(other, [[-1.0, -2.0]], [[True, True]], None), SCORED)
    assert found.change == pytest.approx(math.expm1(0.1))
    assert found.error == pytest.approx(math.exp(0.1) * 0.1)  # 0.3 and twice 0: a deviation of sqrt(0.03), over sqrt(3)
    assert found.same is None


def test_answers_are_alike_until_the_first_difference_or_their_end() -> None:
    assert alike([[1, 2, 3, 4]], [[1, 2, 9, 4]]) == 0.5
    assert alike([[1, 2]], [[1, 2, 3, 4]]) == 0.5
    assert alike([[1, 2, 3], [5]], [[1, 2], [5]]) == 1.0


def test_the_table() -> None:
    worse = [[value - math.log(1.1) for value in row] for row in LOGPROBS]
    rows = [
        Row("bfloat16", figures(SCORED, None)),
        Row("int4 weights", figures(Scored(worse, [[-1.5, -1.75]], [[True, False]], [[5, 6, 9, 8]]), SCORED)),
        Row("nothing", None, "no such key"),
    ]
    lines = table(rows).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == [
        *("int4 weights", "2.7718", "+10.00% ± 0.00%", "50.0%", "0.3750", "50.0%")
    ]
    assert len({len(line) for line in lines[:5]}) == 1
    assert [cell.strip() for cell in lines[4].split("|")[1:3]] == ["nothing", "failed"]
    assert lines[-1] == "- nothing: no such key"


def test_a_setting_that_fails_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(model: str, options: Any, task: Task, answers: Any) -> Scored:
        if "quantization" in options:
            raise ValueError("quantization is not a configuration key")
        return SCORED

    monkeypatch.setattr(engine, "measure", measure)
    told: list[Row] = []
    task = Task("a text", [[1, 2]], [[1]], 4)
    args = argparse.Namespace(model="m", set=["ram=4GiB"])
    for name in ("int4", "kv8"):
        command.run_setting(args, SETTINGS[name], task, SCORED, lambda row, **more: told.append(row))
    assert told[0] == Row("int4 weights", None, "quantization is not a configuration key")
    assert told[1].figures is not None and told[1].figures.same == 1.0


def test_peers_are_held_against_their_own_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: Any) -> Any:
        yield peers.REFERENCE, SCORED, ""
        yield "q8_0", None, "no room"
        yield "q4_0", SCORED, ""

    monkeypatch.setattr(peers, "measure", measure)
    told: list[Row] = []
    args = argparse.Namespace(model="m", peers=["q8_0", "q4_0"], cache=Path())
    command.run_peers(args, Task("a text", [[1, 2]], [[1]], 4), [[5]], lambda row, **more: told.append(row))
    assert [(row.title, row.failure) for row in told] == [
        ("llama.cpp, bfloat16", ""),
        ("llama.cpp, Q8_0", "no room"),
        ("llama.cpp, Q4_0", ""),
    ]
    assert told[0].figures is not None and told[0].figures.change is None
    assert told[2].figures is not None and told[2].figures.change == 0.0

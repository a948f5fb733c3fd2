"""How long prompts are, and what they have in common."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from flexgen_lite.batch import token_counts
from flexgen_lite.batch.token_counts import Counted, count_tokens

BEGINNING = list(range(100, 140))  # two blocks, and a half


def write(path: Path, prompts: list[object], **body: object) -> Path:
    rows = [
        {
            "custom_id": f"r{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": p, "max_tokens": 6} | body,
        }
        for i, p in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_only_whole_blocks_that_others_have_are_shared(tmp_path: Path) -> None:
    prompts = [[*BEGINNING, 1, 2], [*BEGINNING, *range(50)], [7, *BEGINNING], BEGINNING[:17], [5]]
    found = list(count_tokens(write(tmp_path / "in.jsonl", [*prompts]), "", None))
    assert [one.prompt for one in found] == [42, 90, 41, 17, 1]
    assert [len(one.shared) for one in found] == [2, 2, 0, 1, 0]
    assert found[0].shared == found[1].shared and found[3].shared == found[0].shared[:1]


def test_sequences_of_one_request_share_its_prompt(tmp_path: Path) -> None:
    found = list(count_tokens(write(tmp_path / "in.jsonl", [BEGINNING], n=3, temperature=1.0), "", None))
    assert len(found) == 3 and len(found[0].shared) == 2 and found[0] is found[2]


def test_lines_behind_those_that_are_counted_are_as_those(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counts, "MOST_COUNTED", 4)
    found = list(count_tokens(write(tmp_path / "in.jsonl", [BEGINNING] * 40), "", None))
    assert len(found) == 40 and set(found) == {found[0]} and len(found[0].shared) == 2


def test_few_prompts_that_begin_alike_do_not_become_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_counts, "MOST_COUNTED", 160)
    instruction = list(range(900, 932))
    prompts = [[*instruction, *([5 + i // 2] * 40), i] for i in range(1600)]
    found = list(count_tokens(write(tmp_path / "in.jsonl", [*prompts]), "", None))
    assert len(found) == 1600 and {one.common for one in found} == {2} and {len(one.shared) for one in found} == {4}
    questions = Counter((one.shared[3], one.copy) for one in found)
    assert set(questions.values()) == {2}, "two of each document, as in the lines that were counted"


def test_without_a_tokenizer_texts_are_estimated(tmp_path: Path) -> None:
    (found,) = count_tokens(write(tmp_path / "in.jsonl", ["x" * 300]), "", None)
    assert found == Counted(101, 6, False)

import json
import re
from datetime import date

import pytest

from flexgen_lite.demo.records import (
    COUNTRIES,
    END_OF_LINE,
    MAX_LINE_CHARS,
    Record,
    generate,
    is_correct,
    prompt,
    split_of,
)

E164 = re.compile(r"\+[1-9][0-9]{7,14}")


def test_the_same_seed_and_split_give_the_same_records():
    assert generate(3, 50, "train") == generate(3, 50, "train")
    assert generate(3, 50, "train") == generate(3, 80, "train")[:50]
    assert generate(3, 50, "train") != generate(4, 50, "train")


def test_splits_share_no_answer():
    train, held_out = generate(0, 3000, "train"), generate(0, 1000, "held_out")
    assert {split_of(record) for record in train} == {"train"}
    assert {split_of(record) for record in held_out} == {"held_out"}
    assert not {record.answer for record in train} & {record.answer for record in held_out}


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'test'"):
        generate(0, 1, "test")


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_are_json_with_iso_date_and_e164_phone(split):
    for record in generate(5, 500, split):
        answer = json.loads(record.answer)
        assert list(answer) == ["name", "born", "phone"]
        assert answer["name"] == answer["name"].title()
        assert date.fromisoformat(answer["born"]).isoformat() == answer["born"]
        assert E164.fullmatch(answer["phone"])
        assert any(answer["phone"].startswith(f"+{country.dialling_code}") for country in COUNTRIES)


def test_lines_are_short_ascii_and_tell_the_answer():
    for record in generate(6, 500):
        assert record.line.isascii()
        assert len(record.line) <= MAX_LINE_CHARS
        assert prompt(record) == record.line + END_OF_LINE
        answer = json.loads(record.answer)
        first, last = answer["name"].lower().split()
        assert first in record.line.lower()
        assert last in record.line.lower()
        assert answer["born"][:4] in record.line
        assert answer["phone"][-7:] in re.sub(r"\D", "", record.line)


def test_only_the_exact_answer_is_correct():
    record = Record("Ada Berg; 3 Feb 1987; +49 30 1234567", '{"name":"Ada Berg"}')
    assert is_correct(record, record.answer)
    assert is_correct(record, f" {record.answer}\n")
    for text in ("", record.answer + "}", record.answer[:-1], record.answer.replace("A", "a"), record.line):
        assert not is_correct(record, text)

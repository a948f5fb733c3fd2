"""Where a text ends: as a search in all of it would tell, whatever the tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.stop_strings import StopStrings

PIECES = ["a", "b", "ab", "ba b", " ", "\n", "é", "", "abab"]


def decode(tokens: list[int]) -> str:
    return "".join(PIECES[token] for token in tokens)


@given(
    st.lists(st.integers(0, len(PIECES) - 1), max_size=40),
    st.lists(st.text("ab \né", min_size=1, max_size=5), min_size=1, max_size=3),
    st.booleans(),
)
def test_the_first_token_that_completes_a_string_ends_the_text(
    tokens: list[int], strings: list[str], include: bool
) -> None:
    prompt = [0, 1, 2]
    stop = StopStrings(strings, decode)
    for count in range(1, len(tokens) + 1):
        stop.look([*prompt, *tokens[:count]], len(prompt))
        text = decode(tokens[:count])
        if stop.found:
            cut = stop.cut(text, tokens[:count], include)
            places = [text.find(string) for string in strings if string in text]
            assert text.startswith(cut) and len(cut) >= min(places)
            assert any(cut.endswith(string) for string in strings) if include else len(cut) == min(places)
            return
        is_empty_run = all(token == PIECES.index("") for token in tokens[max(0, count - 9) : count])
        assert is_empty_run or not any(string in text for string in strings)


def decode_bytes(tokens: list[int]) -> str:
    return bytes(tokens).decode(errors="replace")


def test_a_string_whose_characters_take_several_tokens() -> None:
    tokens = list("abc 終わりです and on".encode())
    stop = StopStrings(["終わりです"], decode_bytes)
    found = []
    for count in range(1, len(tokens) + 1):
        stop.look(tokens[:count], 0)
        found.append(stop.found)
    assert found.index(True) + 1 == len("abc 終わりです".encode())


def test_a_string_within_the_first_min_tokens_ends_nothing() -> None:
    tokens = list(b"ab ab ab ab")
    stop = StopStrings(["ab"], decode_bytes, min_tokens=5)
    for count in range(6, 9):
        stop.look(tokens[:count], 0)
        assert stop.found == (count == 8)
    assert stop.cut("ab ab ab", tokens[:8], False) == "ab ab "
    reached = StopStrings(["ab"], decode_bytes, min_tokens=4)
    reached.look(tokens[:5], 0)
    assert reached.found, "a string may begin among them"

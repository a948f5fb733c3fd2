"""Where a text ends: as a search in all of it would tell, whatever its pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexgen_lite.tokens.stop_strings import StopStrings


@given(
    st.lists(st.text("ab é", max_size=4), max_size=30),
    st.lists(st.text("ab é", min_size=1, max_size=5), min_size=1, max_size=3),
)
def test_the_first_piece_that_completes_a_string_ends_the_text(pieces: list[str], strings: list[str]) -> None:
    stops, text = StopStrings(strings), ""
    for piece in pieces:
        found, text = stops.find(piece), text + piece
        places = [(text.find(string), string) for string in strings if string in text]
        if places:
            assert found == min(places, key=lambda place: place[0])
            return
        assert found is None
        stops.add(piece)
        assert stops.length == len(text)
        assert text[stops.position :] == max(
            (text[at:] for at in range(len(text) + 1) if any(s.startswith(text[at:]) for s in strings)), key=len
        )


def test_a_string_that_ends_within_the_barrier_ends_nothing() -> None:
    stops = StopStrings(["aba"])
    stops.add("aba")
    stops.barrier = stops.length
    assert stops.find("x") is None
    assert stops.find("ba") == (2, "aba"), "it may begin there"


def test_a_copy_goes_on_alone() -> None:
    stops = StopStrings(["abc"])
    stops.add("xab")
    other = stops.copy()
    stops.add("d")
    assert (stops.position, other.position, other.find("c")) == (4, 1, (1, "abc"))

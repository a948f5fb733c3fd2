"""The functions that a user has for rows, before and after the engine. A row that one fails on is that row's loss.

What the first one asks of the engine travels in one column, as bytes: a table's columns have one type each, and Ray
ends a job in which a prompt, or a sampling parameter, is a text in one row and a number in another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flexgen_lite.ray.rows import ASKED, ERROR, PARAMS, READ, error_in, pack, unpack
from flexgen_lite.text.shown import shown_kind

Row = dict[str, Any]
RowFunction = Callable[[Row], Row]


def preprocessing(function: RowFunction, continues: bool) -> RowFunction:
    """The row with what the function makes of it: over its columns, and in ASKED what is for the engine. A row that has
    failed before, in another processor, stays as it is.

    Args:
        continues: a row that it fails on gets an error, and is not asked for; otherwise the job ends.
    """

    def preprocess(row: Row) -> Row:
        if error_in(row):
            return {**row, ASKED: pack({})}
        try:
            made = _made(function, row)
            asked = {**_asked(row, made), **{name: value for name, value in made.items() if name in READ}}
            own = {name: value for name, value in made.items() if name not in READ}
            return {**row, **own, ASKED: pack(asked), ERROR: ""}
        except Exception as error:  # of any kind: it is this row's alone
            if not continues:
                raise
            return {**row, ASKED: pack({}), ERROR: f"preprocess: {type(error).__name__}: {error}"}

    return preprocess


def postprocessing(function: RowFunction, continues: bool) -> RowFunction:
    """What the function makes of the row; a row that has failed stays as it is.

    Args:
        continues: a row that it fails on stays as it is, with the error, and each of the others has an empty one, so
            that they can be told apart; otherwise the job ends.
    """

    def postprocess(row: Row) -> Row:
        row = dict(row)
        asked = unpack(row.pop(ASKED, None))
        if error_in(row):
            return row
        if not continues:
            return _made(function, {**row, **asked})
        try:
            return {**_made(function, {**row, **asked}), ERROR: ""}
        except Exception as error:  # of any kind: it is this row's alone
            return {**row, ERROR: f"postprocess: {type(error).__name__}: {error}"}

    return postprocess


def _made(function: RowFunction, row: Row) -> Row:
    made = function(dict(row))
    if not isinstance(made, Mapping):
        raise TypeError(f"what it returned is {shown_kind(made)}: return a dict of columns")
    return dict(made)


def _asked(row: Row, made: Row) -> Row:
    """What the row has of that itself. A prompt that is made goes before any that was there."""
    has_prompt = any(made.get(name) is not None for name in READ if name != PARAMS)
    return {name: value for name, value in row.items() if name in READ and (name == PARAMS or not has_prompt)}

"""The functions that a user has for rows, before and after the engine. A row that one fails on is that row's loss.

What the first one asks of the engine travels in one column, as bytes: a table's columns have one type each, and Ray
ends a job in which a prompt, or a sampling parameter, is a text in one row and a number in another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flexgen_lite.ray.rows import ASKED, ERROR, READ, pack, unpack

Row = dict[str, Any]
RowFunction = Callable[[Row], Row]


def preprocessing(function: RowFunction, continues: bool) -> RowFunction:
    """The row with what the function makes of it: over its columns, and in ASKED what is for the engine.

    Args:
        continues: a row that it fails on gets an error, and is not asked for; otherwise the job ends.
    """

    def preprocess(row: Row) -> Row:
        try:
            made = dict(function(dict(row)))
            asked = {name: value for name, value in {**row, **made}.items() if name in READ}
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
        if row.get(ERROR):
            return row
        if not continues:
            return function({**row, **asked})
        try:
            return {**function({**row, **asked}), ERROR: ""}
        except Exception as error:  # of any kind: it is this row's alone
            return {**row, ERROR: f"postprocess: {type(error).__name__}: {error}"}

    return postprocess

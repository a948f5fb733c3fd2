"""Values in messages: on one line and never long, whatever was given."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable
from typing import Any

from flexgen_lite.text.json_text import json_line

MAX_SHOWN = 60  # characters of a value
MAX_PATH = 240  # of a file's path, which is needed as a whole where it is one
MAX_NAME = 40  # characters of one of several names
_MAX_BITS = 10_000  # of a whole number: Python refuses to write out those of more than 4,300 digits


class _Short(reprlib.Repr):
    """Python's form of a value. What would be cut off is not written out first."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother = 3, 2 * MAX_SHOWN

    def repr_str(self, text: str, level: int) -> str:
        return repr(text[: MAX_SHOWN + 1])

    def repr_bytes(self, data: bytes, level: int) -> str:
        return repr(data[: MAX_SHOWN + 1])

    def repr_int(self, number: int, level: int) -> str:
        bits = abs(number).bit_length()
        return repr(number) if bits <= _MAX_BITS else f"<a whole number of {bits} bits>"


_short = _Short()


def shown(value: object) -> str:
    """As Python writes it."""
    return _cut(_one_line(_short.repr(value)))


def shown_json(value: Any) -> str:
    """As JSON writes it: for what came as JSON."""
    if isinstance(value, str):
        return _cut(json_line(value[: MAX_SHOWN + 1]))
    text = ""
    for part in json.JSONEncoder(default=repr).iterencode(value):
        text += part
        if len(text) > MAX_SHOWN:
            break
    return _cut(text)


def shown_text(text: object) -> str:
    """A name, or somebody else's words, without quotation marks."""
    return _cut(_one_line(str(text)[: MAX_SHOWN + 1]))


def shown_names(names: Iterable[object]) -> str:
    """The first of several names, as many as a line has room for."""
    short = [_cut(_one_line(str(name)[: MAX_NAME + 1]), MAX_NAME) for name in names]
    room = 1
    while room < len(short) and len(", ".join(short[: room + 1])) <= MAX_SHOWN:
        room += 1
    listed = ", ".join(short[:room])
    return listed if room >= len(short) else f"{listed} and {len(short) - room} more"


def shown_path(path: object) -> str:
    """Its beginning and its end, where it is too long to be one."""
    text = str(path)
    return _one_line(text if len(text) <= MAX_PATH else f"{text[: MAX_PATH // 2]}...{text[-MAX_PATH // 2 :]}")


def shown_kind(value: object) -> str:
    """What a value is that is of the wrong type."""
    if value is None or isinstance(value, bool):
        return str(value)
    name = shown_text(type(value).__name__)
    return name if name == "bytes" else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def _cut(text: str, most: int = MAX_SHOWN) -> str:
    return text if len(text) <= most else text[:most] + "..."

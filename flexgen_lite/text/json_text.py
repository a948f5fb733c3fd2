"""JSON as lines of text: written so that every reader finds the same lines, read as UTF-8 and nothing else."""

from __future__ import annotations

import json
import math
import re
from typing import Any

BOM = b"\xef\xbb\xbf"

# What some readers take for the end of a line (`str.splitlines`, httpx's `iter_lines`), other control characters, and
# lone surrogates, which UTF-8 cannot hold. JSON escapes those below a space by itself.
_UNSAFE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class JsonError(ValueError):
    """What is no JSON text; the message begins with "not JSON" and says why, and where."""


def json_line(value: Any) -> str:
    """JSON on one line, without its end. Letters stay as they are; what might end a line early is escaped."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def parse_json(data: bytes) -> Any:
    """A JSON text in UTF-8, with or without a byte order mark. A whole number of more than 4,300 digits is infinite, as
    1e400 is.

    Raises:
        JsonError: it is none.
    """
    data = data.removeprefix(BOM)
    if b"\0" in data:
        raise JsonError(f"not JSON: byte {data.index(0) + 1} is NUL, which no text has: save it as UTF-8")
    try:
        return _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise JsonError(f"not JSON: byte {error.start + 1} (0x{byte:02x}) is not UTF-8: save it as UTF-8") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise JsonError("not JSON that can be read: nested too deeply") from None


def _whole_number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # Python reads no longer ones
        return math.copysign(math.inf, -1 if digits.startswith("-") else 1)


_DECODER = json.JSONDecoder(parse_int=_whole_number)

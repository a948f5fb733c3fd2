"""Byte counts as people write them: "8GiB", "500MB", 1073741824."""

from __future__ import annotations

import re
from collections.abc import Callable

from flexgen_lite.text.shown import shown

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[_letter + "B"] = 1000**_power
    _UNITS[_letter] = _UNITS[_letter + "IB"] = 1024**_power

MAX_BYTES = 1 << 62
_SIZE = re.compile(r"(\d{1,40}(?:\.\d{1,40})?|\.\d{1,40}) *([A-Za-z]{0,3})", re.ASCII)
_HOW = f'write it like "8GiB", "500MB" or 1073741824, from 0 to {MAX_BYTES} bytes'


def parse_size(value: int | str) -> int:
    """Read a byte count: a whole number, or a number with a unit.

    MB, GB and so on are powers of 1000; MiB, GiB and the bare letters M, G are powers of 1024. Case does not matter.

    Raises:
        ValueError: what was given is not a size.
    """
    if type(value) is int:
        num_bytes = value
    elif isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        unit = _UNITS.get(match[2].upper()) if match else None
        if match is None or unit is None:
            raise ValueError(f"{shown(value)} is not a size: {_HOW}")
        num_bytes = int(match[1]) * unit if match[1].isdigit() else int(float(match[1]) * unit)
    else:
        raise ValueError(f"{shown(value)} is not a size: {_HOW}")
    if not 0 <= num_bytes <= MAX_BYTES:
        raise ValueError(f"{shown(value)} is not a size that a machine can have: {_HOW}")
    return num_bytes


def format_size(num_bytes: int, rounded: Callable[[float], float] = round) -> str:
    """Write a byte count with one decimal in the largest binary unit that fits it: "1.5 GiB".

    Args:
        rounded: `math.ceil` for what is needed, so that the size told is enough; `math.floor` for what there is.
    """
    sign, size = ("-", -num_bytes) if num_bytes < 0 else ("", num_bytes)
    if size < 1024:
        return f"{sign}{size} B"
    amount = float(size)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        amount /= 1024
        if amount < 1023.95 or unit == "TiB":
            break
    return f"{sign}{rounded(amount * 10) / 10:.1f} {unit}"

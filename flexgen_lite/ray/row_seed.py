"""Seeds for rows that are to be drawn and have none: made of the row itself, so that another actor that is given the
same batch draws the same tokens."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Set
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any, Protocol
from uuid import UUID

SEED_BITS = 63
_AS_TEXT = (date, time, timedelta, Decimal, UUID)


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


class RowSeeds:
    """Of one batch. Rows that are alike get different seeds: the first, the second and so on of them."""

    def __init__(self) -> None:
        self._met: dict[bytes, int] = {}

    def seed(self, row: Mapping[str, Any]) -> int:
        digest = row_digest(row)
        number = self._met.get(digest, 0)
        self._met[digest] = number + 1
        found = hashlib.blake2b(digest + number.to_bytes(8, "little"), digest_size=8).digest()
        return int.from_bytes(found, "little") >> (64 - SEED_BITS)


def row_digest(row: Mapping[str, Any]) -> bytes:
    """Of all columns. Objects that are no data count by their type alone."""
    digest = hashlib.blake2b(digest_size=16)
    _feed(digest, row)
    return digest.digest()


def _feed(digest: _Hash, value: Any) -> None:
    """Each kind of value with a mark, and its length where that varies: no two values are written alike."""
    if isinstance(value, Mapping):
        _mark(digest, "m", len(value))
        for key in sorted(value, key=repr):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        _mark(digest, "l", len(value))
        for item in value:
            _feed(digest, item)
    elif isinstance(value, Set):
        _mark(digest, "S", len(value))
        for item in sorted(value, key=repr):
            _feed(digest, item)
    elif hasattr(value, "tolist"):  # an array, or a single value of one
        _mark(digest, f"a{getattr(value, 'dtype', '')}", 0)
        _feed(digest, value.tolist())
    else:
        _bytes(digest, *_scalar(value))


def _scalar(value: Any) -> tuple[str, bytes]:
    """A mark, and the value."""
    if isinstance(value, str):
        return "s", value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes | bytearray | memoryview):
        return "b", bytes(value)
    if isinstance(value, float):
        return "f", struct.pack("<d", value)
    if value is None:
        return "n", b""
    if isinstance(value, int):
        return type(value).__name__, hex(value).encode()
    return type(value).__qualname__, str(value).encode() if isinstance(value, _AS_TEXT) else b""


def _bytes(digest: _Hash, mark: str, data: bytes) -> None:
    _mark(digest, mark, len(data))
    digest.update(data)


def _mark(digest: _Hash, mark: str, length: int) -> None:
    digest.update(f"{mark}:{length};".encode())

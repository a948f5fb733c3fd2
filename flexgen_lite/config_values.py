"""How the values of a configuration are read: validators, and what each key expects for its error message."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from flexgen_lite.sizes import parse_size

MAX_SOCKET_PATH = 107
"""Longest path that a unix socket can have, in bytes."""

_MAX_CPU = 65535


def _auto_is_none(value: object) -> object:
    return None if value == "auto" else value


def _size(value: object) -> object:
    return None if value is None or value == "auto" else parse_size(value)  # type: ignore[arg-type]


def _cpus(value: object) -> tuple[int, ...]:
    """CPU numbers from a list of numbers, or from the notation of taskset: "0-7,16"."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", value, re.ASCII):
        cpus: list[int] = []
        for part in value.split(","):
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    elif isinstance(value, list | tuple) and all(type(cpu) is int for cpu in value):
        cpus = list(value)
    else:
        raise ValueError("not a list of CPU numbers")
    if not cpus or min(cpus) < 0 or max(cpus) > _MAX_CPU or len(set(cpus)) != len(cpus):
        raise ValueError("no CPU, an impossible one, or one twice")
    return tuple(cpus)


def _cpu_set(value: object) -> object:
    return None if value is None or value == "auto" else _cpus(value)


def _cpu_sets(value: object) -> object:
    if value is None or value == "auto":
        return None
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("not a list with one entry per worker")
    return tuple(_cpus(item) for item in value)


def _path(value: object) -> object:
    return Path(value) if isinstance(value, str) and value else value


def _device(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value, re.ASCII):
        raise ValueError("not a device")
    return value


def _page_tokens(value: object) -> object:
    if value is None or value == "auto":
        return None
    if type(value) is not int or value not in (16, 32, 64, 128, 256):
        raise ValueError("not a power of two in range")
    return value


def _endpoint(value: object) -> object:
    if value is None or value == "auto":
        return None
    if isinstance(value, str) and re.fullmatch(r"tcp://[^\s/:]+:(\d{1,5}|\*)", value, re.ASCII):
        return value
    path = value.removeprefix("ipc://") if isinstance(value, str) and value.startswith("ipc://") else ""
    if not path or path.startswith("@") or len(path.encode()) > MAX_SOCKET_PATH:
        raise ValueError("not an endpoint")
    return value


def expects(text: str) -> dict[str, Any]:
    return {"expects": text}


def count(low: int, description: str, high: int | None = None) -> Any:
    return Field(
        default=None,
        ge=low,
        le=high,
        description=description,
        json_schema_extra=expects(f'a whole number from {low} {f"to {high}" if high else "up"}, or "auto"'),
    )


SIZE_EXPECTED = expects('a size such as "8GiB", "500MB" or a number of bytes, above 0, or "auto"')
CPUS_EXPECTED = expects('CPU numbers without repetition, such as [0, 1] or "0-7,16", or "auto"')
SECONDS_EXPECTED = expects("a number of seconds above 0")

Count = Annotated[int | None, BeforeValidator(_auto_is_none)]
Size = Annotated[int | None, BeforeValidator(_size)]
Cpus = Annotated[tuple[int, ...] | None, BeforeValidator(_cpu_set)]
CpuSets = Annotated[tuple[tuple[int, ...], ...] | None, BeforeValidator(_cpu_sets)]
Switch = Annotated[bool | None, BeforeValidator(_auto_is_none)]
PageTokens = Annotated[int | None, BeforeValidator(_page_tokens)]
Device = Annotated[str, BeforeValidator(_device)]
PathValue = Annotated[Path | None, BeforeValidator(_path)]
Endpoint = Annotated[str | None, BeforeValidator(_endpoint)]

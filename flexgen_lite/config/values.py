"""How the values of a configuration are read: validators, and what each key expects for its error message."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from flexgen_lite.text.sizes import MAX_BYTES, parse_size

MAX_SOCKET_PATH = 107
"""Longest path that a unix socket can have, in bytes."""

MAX_PATH = 4096  # bytes of any path, on Linux
MAX_COUNT = (1 << 31) - 1
MAX_SECONDS = 1e9
MAX_ENGINES = 64
_MAX_CPU, _MAX_GPU, _MAX_PORT = 65535, 999, 65535
_MAX_HOST = 253  # characters of a name, RFC 1035


_TCP = re.compile(rf"tcp://[^\s/:]{{1,{_MAX_HOST}}}:(\d{{1,5}}|\*)", re.ASCII)


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


def _names(value: object) -> object:
    if value is None or value == "auto":
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) and name for name in value):
        raise ValueError("not a list of names")
    return tuple(value)


def _cpu_set(value: object) -> object:
    return None if value is None or value == "auto" else _cpus(value)


def _cpu_sets(value: object) -> object:
    if value is None or value == "auto":
        return None
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("not a list with one entry per worker")
    return tuple(_cpus(item) for item in value)


def _path(value: object) -> object:
    return Path(_path_text(value)) if isinstance(value, str) and value else value


def _path_text(value: object) -> str:
    """A path that the system may have, and that can be sent to a worker."""
    if not isinstance(value, str) or not 0 < len(value) <= MAX_PATH or "\0" in value:
        raise ValueError("not a path")
    value.encode()  # raises ValueError, too
    return value


def _device(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value, re.ASCII):
        raise ValueError("not a device")
    return value


def _engines(value: object) -> object:
    if value != "auto" and not (type(value) is int and 1 <= value <= MAX_ENGINES):
        raise ValueError("not a number of engines")
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
    if isinstance(value, str) and (tcp := _TCP.fullmatch(value)) is not None:
        if tcp[1] != "*" and int(tcp[1]) > _MAX_PORT:
            raise ValueError("no port")
        return value
    path = value.removeprefix("ipc://") if isinstance(value, str) and value.startswith("ipc://") else ""
    if not path or path.startswith("@") or len(path.encode()) > MAX_SOCKET_PATH:
        raise ValueError("not an endpoint")
    return value


def expects(text: str) -> dict[str, Any]:
    return {"expects": text}


def count(low: int, description: str, high: int = MAX_COUNT) -> Any:
    return Field(
        default=None,
        ge=low,
        le=high,
        description=description,
        json_schema_extra=expects(f'a whole number from {low} to {high}, or "auto"'),
    )


def switch(description: str) -> Any:
    return Field(default=None, description=description, json_schema_extra=expects('true, false or "auto"'))


SIZE_EXPECTED = expects(
    f'a size such as "8GiB", "500MB" or a number of bytes, above 0 and up to {MAX_BYTES}, or "auto"'
)
CPUS_EXPECTED = expects(f'CPU numbers from 0 to {_MAX_CPU} without repetition, such as [0, 1] or "0-7,16", or "auto"')
CPU_SETS_EXPECTED = expects(
    f'one list of CPUs, from 0 to {_MAX_CPU}, per worker, such as [[0, 1], [2, 3]] or ["0-7", "8-15"], or "auto"'
)
SECONDS_EXPECTED = expects(f"a number of seconds above 0 and up to {MAX_SECONDS:.0f}")
NAMES_EXPECTED = expects('a list of names of layers, or of regular expressions behind "re:", or "auto"')
DEVICE_EXPECTED = expects(f'"auto", "cpu", "cuda" or "cuda:N", N from 0 to {_MAX_GPU}')
ENGINES_EXPECTED = expects(f'a whole number from 1 to {MAX_ENGINES}, or "auto"')
ENDPOINT_EXPECTED = expects(
    f"ipc:// and the path of a socket, at most {MAX_SOCKET_PATH} bytes, or tcp://HOST:PORT, up to {_MAX_PORT}, with a "
    "key_file"
)

Count = Annotated[int | None, BeforeValidator(_auto_is_none)]
Size = Annotated[int | None, BeforeValidator(_size)]
Cpus = Annotated[tuple[int, ...] | None, BeforeValidator(_cpu_set)]
Names = Annotated[tuple[str, ...] | None, BeforeValidator(_names)]
CpuSets = Annotated[tuple[tuple[int, ...], ...] | None, BeforeValidator(_cpu_sets)]
Switch = Annotated[bool | None, BeforeValidator(_auto_is_none)]
PageTokens = Annotated[int | None, BeforeValidator(_page_tokens)]
Engines = Annotated[int | str, BeforeValidator(_engines)]
Device = Annotated[str, BeforeValidator(_device)]
PathValue = Annotated[Path | None, BeforeValidator(_path)]
AutoPath = Annotated[Path | None, BeforeValidator(_path), BeforeValidator(_auto_is_none)]
ModelName = Annotated[str, BeforeValidator(_path_text)]
Endpoint = Annotated[str | None, BeforeValidator(_endpoint)]

"""What the coordinator and a zygote tell each other, over a socket of whole messages that also carries descriptors."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flexgen_lite.wire.codec import Codec

MOST_BYTES = 1 << 17
MOST_DESCRIPTORS = 253  # that one message carries, by the kernel's limit


@dataclass(frozen=True, slots=True)
class Fork:
    """Another worker, please. Its descriptors come along: standard output, and then one for each of `options`."""

    arguments: tuple[str, ...]
    options: tuple[tuple[str, str], ...]
    environment: dict[str, str]  # beside the zygote's own


@dataclass(frozen=True, slots=True)
class Born:
    """The zygote's first message, with a descriptor of its process."""

    pid: int


@dataclass(frozen=True, slots=True)
class Forked:
    """The answer to `Fork`, with a descriptor of the new process."""

    pid: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A worker that was forked has ended; `code` is negative for a signal."""

    pid: int
    code: int


TO_ZYGOTE, FROM_ZYGOTE = Codec(Fork), Codec(Born | Forked | Ended)


def zygote_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(connection: socket.socket, codec: Codec, message: Any, descriptors: Sequence[int] = ()) -> None:
    """Raises OSError where nobody is at the other end."""
    socket.send_fds(connection, [codec.encode(message)], descriptors)


def receive(connection: socket.socket, codec: Codec) -> tuple[Any, list[int]] | None:
    """A message and the descriptors that came along; None where nobody is at the other end any more."""
    data, descriptors, _, _ = socket.recv_fds(connection, MOST_BYTES, MOST_DESCRIPTORS)
    return (codec.decode(data), list(descriptors)) if data else None


def with_descriptors(
    arguments: Iterable[str], options: Iterable[tuple[str, str]], descriptors: Iterable[int]
) -> list[str]:
    """The arguments, and behind them each option with its descriptor; ("--arena", "kv=") and 7: "--arena", "kv=7"."""
    pairs = zip(options, descriptors, strict=True)
    return [*arguments, *(word for (option, name), number in pairs for word in (option, f"{name}{number}"))]

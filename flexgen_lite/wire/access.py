"""Who may use an engine over the network: those who hold its key file.

The file holds one secret, from which both sides derive a CURVE key pair each (ZeroMQ's encryption, RFC 26): the
engine proves that it is the engine, the client that it may use it, and all that goes between them is encrypted.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq
from zmq.utils import z85

from flexgen_lite.text.shown import shown_path

ZAP_ENDPOINT = "inproc://zeromq.zap.01"  # ZeroMQ asks there who may come in, RFC 27
DOMAIN = b"flexgen-lite"
_PREFIX = "flexgen-lite key "
_SECRET_BYTES = 32


class KeyFileError(ValueError):
    """A key file that cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class _Pair:
    public: bytes
    secret: bytes


@dataclass(frozen=True, slots=True)
class Keys:
    engine: _Pair
    client: _Pair

    def guard(self, socket: zmq.Socket[bytes]) -> None:
        """For the engine's socket, before it is bound."""
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.engine.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)

    def identify(self, socket: zmq.Socket[bytes]) -> None:
        """For a client's socket, before it is connected."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.engine.public)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.client.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.client.secret)

    def answer(self, request: list[bytes]) -> list[bytes]:
        """What to say to ZeroMQ's question whether somebody may come in."""
        version, number, mechanism, shown = request[0], request[1], request[5], request[6:]
        good = mechanism == b"CURVE" and len(shown) == 1 and z85.encode(shown[0]) == self.client.public
        code, text = (b"200", b"OK") if good else (b"400", b"another key")
        return [version, number, code, text, b"", b""]


def make_key_file(path: Path) -> None:
    """A new secret in a new file that its owner alone may read. Raises FileExistsError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise FileExistsError(f"{path} is there already: give another name") from None
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{_PREFIX}{secrets.token_hex(_SECRET_BYTES)}\n")


def read_key_file(path: Path) -> Keys:
    """Raises KeyFileError."""
    try:
        with path.open(encoding="ascii", errors="replace") as file:
            mode, text = os.fstat(file.fileno()).st_mode, file.read(1000)
    except OSError as error:
        raise KeyFileError(
            f"key_file {shown_path(path)}: {error.strerror}: make one with `flexgen-lite keygen`"
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise KeyFileError(f"key_file {path} can be read by others: chmod 600 {path}")
    digits = text.removeprefix(_PREFIX).strip()
    try:
        secret = bytes.fromhex(digits)
    except ValueError:
        secret = b""
    if not text.startswith(_PREFIX) or len(secret) != _SECRET_BYTES:
        raise KeyFileError(f"key_file {path} holds no key: make one with `flexgen-lite keygen`")
    return Keys(_pair(secret, b"engine"), _pair(secret, b"client"))


def _pair(secret: bytes, who: bytes) -> _Pair:
    derived: Any = z85.encode(hashlib.blake2b(secret, digest_size=32, person=who).digest())
    return _Pair(zmq.curve_public(derived), derived)

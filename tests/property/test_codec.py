"""Every message survives the wire, and nothing but a message gets through."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import typing
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexgen_lite.wire import client_messages, worker_messages
from flexgen_lite.wire.codec import Codec, MessageError

UNIONS = {
    name: union
    for module in (worker_messages, client_messages)
    for name, union in vars(module).items()
    if name.startswith(("To", "From")) and typing.get_args(union)
}
MEMBERS = sorted({(name, member) for name, union in UNIONS.items() for member in typing.get_args(union)}, key=str)


@functools.cache
def instances(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, as the sender may have them."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{field.name: instances(hints[field.name]) for field in dataclasses.fields(hint)})
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(instances(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*[instances(arg) for arg in args])
    if origin is dict:
        return st.dictionaries(instances(args[0]), instances(args[1]), max_size=3)
    if args:
        return st.one_of([instances(arg) for arg in args])
    scalars = {
        int: st.integers(-(1 << 63), (1 << 63) - 1),
        float: st.floats(allow_nan=False),
        str: st.text(max_size=20),
        bytes: st.binary(max_size=20),
        bool: st.booleans(),
        type(None): st.none(),
    }
    return scalars[hint]


ANY_MESSAGE = st.sampled_from(MEMBERS).flatmap(lambda pair: st.tuples(st.just(pair[0]), instances(pair[1])))
CODECS = {name: Codec(union) for name, union in UNIONS.items()}
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # a whole model's description is big
@given(ANY_MESSAGE)
def test_messages_round_trip(pair: tuple[str, Any]) -> None:
    name, message = pair
    assert CODECS[name].decode(CODECS[name].encode(message)) == message


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(ANY_MESSAGE, st.data())
def test_changed_bytes_are_a_message_or_a_message_error(pair: tuple[str, Any], data: st.DataObject) -> None:
    name, message = pair
    changed = bytearray(CODECS[name].encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(changed) - 1))
        changed[position : position + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        if not changed:
            break
    with contextlib.suppress(MessageError):
        decoded = CODECS[name].decode(bytes(changed))
        assert isinstance(decoded, typing.get_args(UNIONS[name]))


@given(st.sampled_from(sorted(UNIONS)), st.binary(max_size=64))
def test_bytes_of_any_kind(name: str, data: bytes) -> None:
    with contextlib.suppress(MessageError):
        CODECS[name].decode(data)


@given(st.sampled_from(MEMBERS), PLAIN)
def test_fields_of_any_kind(pair: tuple[str, type], fields: Any) -> None:
    name, member = pair
    with contextlib.suppress(MessageError):
        CODECS[name].decode(msgpack.packb([member.__name__, fields]))


def test_errors_name_message_and_field() -> None:
    codec = CODECS["ToEngine"]
    with pytest.raises(MessageError, match=r"Connect\.protocol: expected int, got 'one'"):
        codec.decode(msgpack.packb(["Connect", ["one"]]))
    with pytest.raises(MessageError, match="expected Connect with 1 fields"):
        codec.decode(msgpack.packb(["Connect", [1, 2]]))
    with pytest.raises(MessageError, match="unknown message 'Reboot'"):
        codec.decode(msgpack.packb(["Reboot", []]))
    with pytest.raises(MessageError, match="Stop is not one of Connect"):
        codec.encode(worker_messages.Stop())
    with pytest.raises(MessageError, match="9 bytes, 4 allowed"):
        Codec(client_messages.ToEngine, max_bytes=4).decode(b"123456789")

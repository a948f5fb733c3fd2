"""MessagePack codec for frozen dataclasses: checked on arrival, never a pickle.

A message is an array: its tag (the class name), then its fields in order. `Codec(Union)` accepts the members of one
union; whatever else arrives is a MessageError that names the message, the field and what was expected.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from typing import Any

import msgpack

from flexgen_lite.text.shown import shown


class MessageError(ValueError):
    """A message that does not have the agreed form."""


Check = Callable[[Any], Any]


def _expected(what: str, value: object) -> MessageError:
    return MessageError(f"expected {what}, got {shown(value)}")


def _check_int(value: Any) -> Any:
    if type(value) is not int:
        raise _expected("int", value)
    return value


def _check_float(value: Any) -> Any:
    if type(value) is float:
        return value
    if type(value) is int:
        return float(value)
    raise _expected("float", value)


def _check_exact(kind: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise _expected(kind.__name__, value)
        return value

    return check


def _check_sequence(item: Check) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not list:
            raise _expected("array", value)
        return tuple([item(element) for element in value])

    return check


def _check_int_sequence(value: Any) -> Any:
    if type(value) is not list:
        raise _expected("array", value)
    for element in value:
        if type(element) is not int:
            raise _expected("int", element)
    return tuple(value)


def _check_fixed(items: list[Check]) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not list or len(value) != len(items):
            raise _expected(f"array of {len(items)}", value)
        return tuple([item(element) for item, element in zip(items, value, strict=True)])

    return check


def _check_mapping(key: Check, item: Check) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not dict:
            raise _expected("map", value)
        return {key(k): item(v) for k, v in value.items()}

    return check


def _check_union(options: list[Check]) -> Check:
    def check(value: Any) -> Any:
        for option in options:
            try:
                return option(value)
            except MessageError:
                continue
        raise _expected("one of the union's types", value)

    return check


def _check_optional(item: Check) -> Check:
    def check(value: Any) -> Any:
        return None if value is None else item(value)

    return check


def _check_dataclass(cls: type) -> Check:
    hints = typing.get_type_hints(cls)
    fields = [(field.name, _check_for(hints[field.name])) for field in dataclasses.fields(cls)]

    def check(value: Any) -> Any:
        if type(value) is not list or len(value) != len(fields):
            raise _expected(f"{cls.__name__} with {len(fields)} fields", value)
        checked = []
        for (name, item), element in zip(fields, value, strict=True):
            try:
                checked.append(item(element))
            except MessageError as error:
                raise MessageError(f"{cls.__name__}.{name}: {error}") from None
        return cls(*checked)

    return check


_SCALARS: dict[Any, Check] = {int: _check_int, float: _check_float}


def _check_for(hint: Any) -> Check:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SCALARS:
        return _SCALARS[hint]
    if hint in (str, bytes, bool):
        return _check_exact(hint)
    if dataclasses.is_dataclass(hint):
        return _check_dataclass(typing.cast(type, hint))
    if origin is tuple and args[-1] is Ellipsis:
        return _check_int_sequence if args[0] is int else _check_sequence(_check_for(args[0]))
    if origin is tuple:
        return _check_fixed([_check_for(arg) for arg in args])
    if origin is dict:
        return _check_mapping(_check_for(args[0]), _check_for(args[1]))
    if origin in (types.UnionType, typing.Union):
        options = [_check_for(arg) for arg in args if arg is not type(None)]
        check = options[0] if len(options) == 1 else _check_union(options)
        return _check_optional(check) if type(None) in args else check
    raise TypeError(f"no wire form for {hint!r}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple):
        if value and type(value[0]) is int:
            return value
        return [_plain(element) for element in value]
    if isinstance(value, dict):
        return {key: _plain(element) for key, element in value.items()}
    return value


class Codec:
    """Encodes and decodes the members of one union of frozen dataclasses.

    Args:
        union: a dataclass or a union of dataclasses.
        max_bytes: longest message accepted.
    """

    def __init__(self, union: Any, max_bytes: int = 1 << 30) -> None:
        members = typing.get_args(union) or (union,)
        self._checks = {member.__name__: _check_dataclass(member) for member in members}
        self._max_bytes = max_bytes

    def encode(self, message: Any) -> bytes:
        tag = type(message).__name__
        if tag not in self._checks:
            raise MessageError(f"{tag} is not one of {', '.join(self._checks)}")
        return typing.cast(bytes, msgpack.packb([tag, _plain(message)], use_bin_type=True))

    def decode(self, data: bytes) -> Any:
        if len(data) > self._max_bytes:
            raise MessageError(f"message of {len(data)} bytes, {self._max_bytes} allowed")
        try:
            value = msgpack.unpackb(data, raw=False, strict_map_key=False)
        except Exception as error:  # msgpack raises many kinds, all of them mean the same to the receiver
            raise MessageError(f"not MessagePack: {type(error).__name__}: {error}") from None
        if type(value) is not list or len(value) != 2 or type(value[0]) is not str:
            raise _expected("[tag, fields]", value)
        check = self._checks.get(value[0])
        if check is None:
            raise MessageError(f"unknown message {shown(value[0])}, expected one of {', '.join(self._checks)}")
        return check(value[1])

"""The header of a GGUF file: its values, and where its tensors lie. Little endian.

    "GGUF", u32 version, u64 number of tensors, u64 number of values
    values   key (string), u32 type, value; a string is u64 length, UTF-8; an array u32 type, u64 count, items
    tensors  name (string), u32 number of dimensions, u64 each (that along a row first), u32 type, u64 offset
    data     from the next multiple of general.alignment (32) on, as each tensor does

Source: ggml's docs/gguf.md; sizes of blocks: ggml's ggml-common.h.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from flexgen_lite.model.files import CheckpointError, open_file, read
from flexgen_lite.model.spec import FileStamp
from flexgen_lite.text.shown import shown_path, shown_text

MAGIC = b"GGUF"
ALIGNMENT = "general.alignment"
AGAIN = "download it again"
_VERSIONS = (2, 3)
_MAX_COUNT = 1 << 24  # of tensors, values or items: more than any file has
_MAX_STRING = 1 << 26
_MAX_INT = (1 << 63) - 1
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class BlockType:
    """How items are stored: `num_bytes` for every `items` along a row."""

    name: str
    items: int
    num_bytes: int


TYPES = {
    0: BlockType("F32", 1, 4), 1: BlockType("F16", 1, 2), 30: BlockType("BF16", 1, 2),
    2: BlockType("Q4_0", 32, 18), 3: BlockType("Q4_1", 32, 20), 6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24), 8: BlockType("Q8_0", 32, 34), 12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176), 14: BlockType("Q6_K", 256, 210),
}  # fmt: skip
"""Those that are read, by ggml's number."""
_NOT_READ = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """`shape` is outermost first, `offset` from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: BlockType
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """`values` are numbers, strings, and lists of them; long lists of tokens too."""

    path: Path
    stamp: FileStamp
    values: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def is_gguf(path: Path) -> bool:
    """Whether it names a GGUF file, which may not be there, or is one by another name."""
    if path.suffix.lower() == ".gguf":
        return not path.is_dir()
    try:
        with open_file(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except CheckpointError:
        return False


def read_header(path: Path) -> GgufHeader:
    """
    Raises:
        CheckpointError: it is no such file, is damaged, or has tensors of types that are not read.
    """
    with open_file(path) as stream:
        status = os.fstat(stream.fileno())
        header = _Header(stream, path, status.st_size)
        values, entries = header.read()
        alignment = values.get(ALIGNMENT, 32)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise header.error(f"{ALIGNMENT} is {alignment!r}, and no multiple of 8")
        begin = -(-header.at // alignment) * alignment
        tensors = tuple(_tensor(header, entry, begin, alignment) for entry in entries)
        _check_places(header, tensors, begin)
    return GgufHeader(path, FileStamp(status.st_size, status.st_mtime_ns, status.st_ino), values, tensors)


_Entry = tuple[str, tuple[int, ...], int, int]


class _Header:
    """Bytes of a file from its start on; nothing is asked for that the file cannot have."""

    def __init__(self, stream: BinaryIO, path: Path, size: int) -> None:
        self._stream, self._path, self._size = stream, path, size
        self._buffer, self._place = b"", 0
        self.at = 0

    def error(self, message: str, remedy: str = AGAIN) -> CheckpointError:
        return CheckpointError(f"{shown_path(self._path)}: {message}: {remedy}")

    def read(self) -> tuple[dict[str, Any], list[_Entry]]:
        """The values, and the table of tensors."""
        start = self._bytes(min(self._size, 24))
        if start[:8] == b"version ":
            raise self.error("it is a Git LFS pointer, not the model", "fetch it with git lfs pull")
        if start[:4] != MAGIC:
            raise self.error("it does not begin as a GGUF file does")
        if len(start) < 24:
            raise self._cut_off("the numbers at its start")
        version, num_tensors, num_values = struct.unpack("<IQQ", start[4:])
        if version not in _VERSIONS:
            if int.from_bytes(start[4:8], "big") in _VERSIONS:
                raise self.error("its numbers are big-endian, which is not read", "get the file for little-endian")
            raise self.error(
                f"it is of version {version}, and only {' and '.join(map(str, _VERSIONS))} are read",
                "get a newer file of the model",
            )
        if max(num_tensors, num_values) > _MAX_COUNT:
            raise self.error(f"it says that it has {num_tensors} tensors and {num_values} values")
        values: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string("a key")
            if key in values:
                raise self.error(f"it has the key {shown_text(key)} twice")
            values[key] = self._value(self._number("I", key), key)
        return values, self._table(num_tensors)

    def _table(self, num_tensors: int) -> list[_Entry]:
        entries: dict[str, _Entry] = {}
        for _ in range(num_tensors):
            name = self._string("the name of a tensor")
            if name in entries:
                raise self.error(f"it has tensor {shown_text(name)} twice")
            where = f"tensor {shown_text(name)}"
            num_dims = self._number("I", where)
            if not 1 <= num_dims <= 4:
                raise self.error(f"{where} has {num_dims} dimensions")
            dims = tuple(self._number("Q", where) for _ in range(num_dims))
            entries[name] = (name, dims[::-1], self._number("I", where), self._number("Q", where))
        return list(entries.values())

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            kind, count = self._number("I", key), self._number("Q", key)
            if count > _MAX_COUNT:
                raise self.error(f"{shown_text(key)} has {count} items")
            if kind == _STRING:
                return [self._string(key) for _ in range(count)]
            if kind in _NUMBERS:
                letter = _NUMBERS[kind]
                return list(struct.unpack(f"<{count}{letter}", self._need(count * struct.calcsize(letter), key)))
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind], key)
        raise self.error(f"{shown_text(key)} is of type {kind}, which there is not")

    def _number(self, letter: str, what: str) -> Any:
        return struct.unpack(f"<{letter}", self._need(struct.calcsize(f"<{letter}"), what))[0]

    def _string(self, what: str) -> str:
        length = self._number("Q", what)
        if length > _MAX_STRING:
            raise self.error(f"{shown_text(what)} has a text of {length} bytes")
        try:
            return self._need(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.error(f"{shown_text(what)} has a text that is not UTF-8") from None

    def _need(self, count: int, what: str) -> bytes:
        if self.at + count > self._size:
            raise self._cut_off(what)
        return self._bytes(count)

    def _bytes(self, count: int) -> bytes:
        if self._place + count > len(self._buffer):
            more = read(self._stream, self._path, max(count, _READ_BYTES))
            self._buffer, self._place = self._buffer[self._place :] + more, 0
            if len(self._buffer) < count:
                raise self._cut_off("its header")
        found = self._buffer[self._place : self._place + count]
        self._place += count
        self.at += count
        return found

    def _cut_off(self, what: str) -> CheckpointError:
        return self.error(f"it is cut off, {self._size} bytes do not hold {shown_text(what)}")

    def check_end(self, end: int, where: str) -> None:
        if end > self._size:
            raise self.error(f"it is cut off: {where} ends at byte {end} of {self._size}")


def _tensor(header: _Header, entry: _Entry, begin: int, alignment: int) -> GgufTensor:
    name, shape, number, offset = entry
    where = f"tensor {shown_text(name)}"
    kind = TYPES.get(number)
    if kind is None:
        named = _NOT_READ.get(number, f"type {number}")
        raise header.error(
            f"{where} is stored as {named}, and only {', '.join(one.name for one in TYPES.values())} are read",
            "get a file of the model in these, Q4_K_M or Q8_0 for example",
        )
    if not all(1 <= size <= _MAX_INT for size in shape) or math.prod(shape) > _MAX_INT:
        raise header.error(f"{where} has the impossible shape {list(shape)}")
    if shape[-1] % kind.items:
        raise header.error(f"{where} has rows of {shape[-1]} items, and {kind.name} has blocks of {kind.items}")
    if offset % alignment or offset > _MAX_INT:
        raise header.error(f"{where} begins at {offset} of the data, which is no multiple of {alignment}")
    return GgufTensor(name, shape, kind, begin + offset, math.prod(shape) // kind.items * kind.num_bytes)


def _check_places(header: _Header, tensors: tuple[GgufTensor, ...], begin: int) -> None:
    end = begin
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise header.error(f"tensor {shown_text(tensor.name)} overlaps the tensor before it")
        end = tensor.offset + tensor.num_bytes
        header.check_end(end, f"tensor {shown_text(tensor.name)}")

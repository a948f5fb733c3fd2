"""Requests in the OpenAI batch file format, one a line."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_lite.batch.lines import is_blank, open_lines
from flexgen_lite.batch.shard import WHOLE, Shard
from flexgen_lite.chat.template import Chat
from flexgen_lite.client.completion import Prompt
from flexgen_lite.client.sampling_params import SamplingParams
from flexgen_lite.openai.request_body import URLS, BodyError, parse_body, refuse_unknown
from flexgen_lite.text.json_text import JsonError, parse_json
from flexgen_lite.text.shown import shown, shown_json

_LINE = frozenset({"custom_id", "method", "url", "body"})
_COUNT_UP_TO = 4 << 30  # bytes of a file whose lines are counted beforehand


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One good line. `model` is what the line asks for, if it does."""

    custom_id: str
    prompt: Prompt | Chat
    params: SamplingParams
    return_token_ids: bool
    model: str | None
    echo: bool = False


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request.

    Attributes:
        custom_id: None where none could be read.
        message: what is wrong with it.
        digest: 16 hexadecimal digits of the line's bytes, and of how many lines before it were the same.
        is_repeat: it is none only because an earlier line has its custom_id.
    """

    custom_id: str | None
    message: str
    digest: str
    is_repeat: bool = False


class IdSet:
    """A growing set of strings in 8 bytes each at a load below two thirds, of which it keeps 64-bit hashes.

    Two different ones among a million are taken for the same with a probability of 3e-8.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0

    def add(self, text: str) -> bool:
        """Add it; False if it was there already."""
        if not self._place(_hash(text)):
            return False
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):
            old = self._slots
            self._slots = array("Q", bytes(16 * len(old)))
            for value in old:
                if value:
                    self._place(value)
        return True

    def __contains__(self, text: str) -> bool:
        value, slots, mask = _hash(text), self._slots, len(self._slots) - 1
        at = value & mask
        while slots[at] not in (0, value):
            at = (at + 1) & mask
        return slots[at] == value

    def _place(self, value: int) -> bool:
        slots, mask = self._slots, len(self._slots) - 1
        at = value & mask
        while slots[at]:
            if slots[at] == value:
                return False
            at = (at + 1) & mask
        slots[at] = value
        return True


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


class _Digests:
    """Digests of bad lines; lines that are the same get different ones, by their order."""

    def __init__(self) -> None:
        self._seen = IdSet()
        self._repeats: dict[str, int] = {}

    def of(self, line: bytes) -> str:
        digest = hashlib.blake2b(line.strip(), digest_size=8)
        first = digest.hexdigest()
        if self._seen.add(first):
            return first
        self._repeats[first] = self._repeats.get(first, 0) + 1
        digest.update(b"\n%d" % self._repeats[first])
        return digest.hexdigest()


def read_requests(lines: Iterator[bytes], shard: Shard = WHOLE) -> Iterator[BatchRequest | BadLine]:
    """Read the shard's requests one by one; blank lines are passed over. Of other lines no more is read than what they
    have in common with these: a custom_id is used once in the whole file.

    Memory: the line at hand and 12 to 24 bytes for each custom_id and bad line seen.
    """
    seen, digests = IdSet(), _Digests()
    for number, line in enumerate(lines, start=1):
        if is_blank(line):
            continue
        custom_id, is_repeat, is_ours = None, False, shard.has(number - 1)
        try:
            row = _parse_line(line)
            custom_id = _custom_id(row)
            if not seen.add(custom_id):
                is_repeat = True
                raise BodyError(f"custom_id {shown(custom_id)} was used by an earlier line: give each its own")
            if is_ours:
                yield _request(custom_id, row)
        except BodyError as error:
            digest = digests.of(line)
            if is_ours:
                yield BadLine(custom_id, f"line {number}: {error}", digest, is_repeat)


def count_lines(path: Path, shard: Shard = WHOLE) -> int | None:
    """The shard's lines that are not blank, or None where counting takes long or reading would use the file up.

    Raises:
        BatchFileError: it is no batch file.
    """
    if not path.is_file() or path.stat().st_size > _COUNT_UP_TO:
        return None
    with open_lines(path) as lines:
        return sum(shard.has(number) and not is_blank(line) for number, line in enumerate(lines))


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except JsonError as error:
        raise BodyError(str(error)) from None
    if not isinstance(row, dict):
        raise BodyError("not a JSON object")
    return row


def _custom_id(row: dict[str, Any]) -> str:
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise BodyError("custom_id is missing or not a string")
    return custom_id


def _request(custom_id: str, row: dict[str, Any]) -> BatchRequest:
    refuse_unknown("", row, _LINE)
    if row.get("method") != "POST":
        raise BodyError(f'method is {shown_json(row.get("method"))}: only "POST" is supported')
    url, body = row.get("url"), row.get("body")
    if not isinstance(url, str) or url not in URLS:
        raise BodyError(f"url is {shown_json(url)}: supported are {', '.join(URLS)}")
    if not isinstance(body, dict):
        raise BodyError("body is missing or not an object")
    found = parse_body(url, body, "body.")
    return BatchRequest(custom_id, found.prompt, found.params, found.return_token_ids, found.model, found.echo)

"""Requests in the OpenAI batch file format, one a line."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexgen_lite.completion import Prompt
from flexgen_lite.sampling_params import MAX_TOKEN_ID, SamplingParams

URL = "/v1/completions"

_PARAMS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "include_stop_str_in_output",
    "logprobs",
    "n",
    "prompt_logprobs",
)
_BODY = frozenset({"model", "prompt", "echo", "return_token_ids", *_PARAMS})
_LINE = frozenset({"custom_id", "method", "url", "body"})
_COUNT_UP_TO = 4 << 30  # bytes of a file whose lines are counted beforehand


class RequestError(ValueError):
    """A line that is no request; the message says why."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One good line. `model` is what the line asks for, if it does."""

    custom_id: str
    prompt: Prompt
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


def read_requests(lines: Iterator[bytes]) -> Iterator[BatchRequest | BadLine]:
    """Read requests one by one; blank lines are passed over.

    Memory: the line at hand and 12 to 24 bytes for each custom_id and bad line seen.
    """
    seen, digests = IdSet(), _Digests()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        custom_id, is_repeat = None, False
        try:
            row = _parse_line(line)
            custom_id = _custom_id(row)
            if not seen.add(custom_id):
                is_repeat = True
                raise RequestError(f"custom_id {custom_id!r} was used by an earlier line: give each its own")
            yield _request(custom_id, row)
        except RequestError as error:
            yield BadLine(custom_id, f"line {number}: {error}", digests.of(line), is_repeat)


def count_lines(path: Path) -> int | None:
    """Lines of a file, or None where counting takes long or reading would use it up."""
    if not path.is_file() or path.stat().st_size > _COUNT_UP_TO:
        return None
    num_lines, last = 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            num_lines += chunk.count(b"\n")
            last = chunk
    return num_lines + (not last.endswith(b"\n"))


def _parse_line(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise RequestError("not a JSON object")
    return row


def _custom_id(row: dict[str, Any]) -> str:
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestError("custom_id is missing or not a string")
    return custom_id


def _request(custom_id: str, row: dict[str, Any]) -> BatchRequest:
    _refuse_unknown("", row, _LINE)
    if row.get("method") != "POST":
        raise RequestError(f'method is {_shown(row.get("method"))}: only "POST" is supported')
    if row.get("url") != URL:
        raise RequestError(f'url is {_shown(row.get("url"))}: only "{URL}" is supported')
    body = row.get("body")
    if not isinstance(body, dict):
        raise RequestError("body is missing or not an object")
    _refuse_unknown("body.", body, _BODY)
    body = {key: value for key, value in body.items() if value is not None}
    if not isinstance(body.get("model", ""), str):
        raise RequestError("body.model is not a string")
    for name in ("return_token_ids", "echo"):
        if type(body.get(name, False)) is not bool:
            raise RequestError(f"body.{name} is {_shown(body[name])}: give true or false")
    echo = body.get("echo", False)
    if echo and "logprobs" in body:
        body.setdefault("prompt_logprobs", body["logprobs"])
    if "logit_bias" in body:
        body["logit_bias"] = _logit_bias(body["logit_bias"])
    try:
        params = SamplingParams(**{key: body[key] for key in _PARAMS if key in body})
    except ValueError as error:
        raise RequestError(f"body.{error}") from None
    prompt, return_token_ids = _prompt(body.get("prompt")), body.get("return_token_ids", False)
    return BatchRequest(custom_id, prompt, params, return_token_ids, body.get("model"), echo)


def _logit_bias(value: object) -> object:
    """JSON has no numbers as keys."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(token_id): bias for token_id, bias in value.items()}
    except ValueError:
        raise RequestError(f"body.logit_bias is {_shown(value)}: its keys must be token ids") from None


def _prompt(prompt: object) -> Prompt:
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise RequestError("body.prompt has characters that are not Unicode text") from None
        return prompt
    if not isinstance(prompt, list):
        raise RequestError("body.prompt is missing or neither a string nor a list of token ids")
    for token_id in prompt:
        if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
            raise RequestError(f"body.prompt has {_shown(token_id)} among its token ids (one prompt a line)")
    return prompt


def _refuse_unknown(where: str, given: dict[str, Any], known: frozenset[str]) -> None:
    unknown = sorted(given.keys() - known)
    if unknown:
        names = ", ".join(where + name for name in unknown)
        raise RequestError(f"{names}: not supported; supported are {', '.join(sorted(known))}")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."

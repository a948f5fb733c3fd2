"""The OpenAI batch file format: one request a line in, one result a line out."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flexgen_lite.completion import Completion, Prompt
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
)
_BODY = frozenset({"model", "prompt", "n", "return_token_ids", *_PARAMS})
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


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request; `custom_id` is None where none could be read."""

    custom_id: str | None
    message: str


class IdSet:
    """A growing set of strings in 8 bytes each at a load below two thirds, of which it keeps 64-bit hashes.

    Two different ones among a million are taken for the same with a probability of 3e-8.
    """

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * 1024))
        self._count = 0

    def add(self, text: str) -> bool:
        """Add it; False if it was there already."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        if not self._place(int.from_bytes(digest, "little") or 1):
            return False
        self._count += 1
        if 3 * self._count > 2 * len(self._slots):
            old = self._slots
            self._slots = array("Q", bytes(16 * len(old)))
            for value in old:
                if value:
                    self._place(value)
        return True

    def _place(self, value: int) -> bool:
        slots, mask = self._slots, len(self._slots) - 1
        at = value & mask
        while slots[at]:
            if slots[at] == value:
                return False
            at = (at + 1) & mask
        slots[at] = value
        return True


def read_requests(lines: Iterator[bytes]) -> Iterator[BatchRequest | BadLine]:
    """Read requests one by one; blank lines are passed over.

    Memory: the line at hand and 12 to 24 bytes for each custom_id seen.
    """
    seen = IdSet()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        custom_id = None
        try:
            row = _parse_line(line)
            custom_id = _custom_id(row)
            if not seen.add(custom_id):
                raise RequestError(f"custom_id {custom_id!r} was used by an earlier line: give each its own")
            yield _request(custom_id, row)
        except RequestError as error:
            yield BadLine(custom_id, f"line {number}: {error}")


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
    if type(body.get("n", 1)) is not int or body.get("n", 1) != 1:
        raise RequestError(f"body.n is {_shown(body['n'])}: only 1 is supported")
    if not isinstance(body.get("model", ""), str):
        raise RequestError("body.model is not a string")
    if type(return_token_ids := body.get("return_token_ids", False)) is not bool:
        raise RequestError(f"body.return_token_ids is {_shown(return_token_ids)}: give true or false")
    try:
        params = SamplingParams(**{key: body[key] for key in _PARAMS if key in body})
    except ValueError as error:
        raise RequestError(f"body.{error}") from None
    return BatchRequest(custom_id, _prompt(body.get("prompt")), params, return_token_ids, body.get("model"))


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


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise FileExistsError if there are results that would be lost."""
    if not overwrite and path.exists() and path.stat().st_size > 0:
        raise FileExistsError(f"{path} has results already: give another output file, or --overwrite")


class ResultWriter:
    """Appends result rows to a file, whole and flushed. May be used by several threads.

    Raises:
        FileExistsError: the file has something in it, and `overwrite` is not set.
    """

    def __init__(self, path: Path, *, model: str, overwrite: bool = False) -> None:
        refuse_existing(path, overwrite)
        self._file: IO[bytes] = path.open("wb")
        self._lock = threading.Lock()
        self._model = model
        self._run_id = os.urandom(8).hex()
        self._num_rows = 0

    def write(self, request: BatchRequest, completion: Completion) -> None:
        """The result of a request, good or failed."""
        if completion.error is not None:
            self._append(request.custom_id, None, completion.error)
        else:
            self._append(request.custom_id, _body(request, completion, self._model), None)

    def write_bad_line(self, line: BadLine) -> None:
        self._append(line.custom_id, None, line.message)

    def close(self) -> None:
        """No further row is written. Safe to call twice."""
        with self._lock:
            self._file.close()

    def _append(self, custom_id: str | None, body: dict[str, Any] | None, error: str | None) -> None:
        with self._lock:
            if self._file.closed:
                return
            row_id = f"{self._run_id}{self._num_rows:08x}"
            self._num_rows += 1
            if body is not None:
                body = {"id": f"cmpl-{row_id}", **body}
            row = {
                "id": f"batch_req_{row_id}",
                "custom_id": custom_id,
                "response": {
                    "status_code": 200 if error is None else 400,
                    "request_id": f"req_{row_id}",
                    "body": body,
                },
                "error": None if error is None else {"message": error, "type": "BadRequestError", "code": 400},
            }
            # A lone surrogate, which UTF-8 cannot hold, becomes the JSON escape that it came from.
            line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
            self._file.write(line + b"\n")
            self._file.flush()


def _body(request: BatchRequest, completion: Completion, model: str) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": 0,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "logprobs": None,
    }
    if request.return_token_ids:
        choice["token_ids"] = completion.token_ids
    prompt_tokens, completion_tokens = completion.num_prompt_tokens, len(completion.token_ids)
    return {
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }

"""Result rows in the OpenAI batch file format, and what the rows of an earlier run answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexgen_lite.batch.file import BadLine, BatchRequest, IdSet
from flexgen_lite.chat.template import Chat
from flexgen_lite.openai.response_body import ID_PREFIXES
from flexgen_lite.text.json_text import JsonError, json_line, parse_json
from flexgen_lite.text.shown import shown

WAY_OUT = "give another output file, or --overwrite"

_START = b'{"id": "batch_req_'
_NO_JSON = object()
_REQUEST_ID = re.compile(r"(req|line)_[0-9a-f]{16}")


def request_id_of(item: BatchRequest | BadLine, engine: str) -> str:
    """What a row says of the line that it answers: the same for the same request to the same engine.

    Args:
        item: the line.
        engine: the engine's fingerprint.
    """
    if isinstance(item, BadLine):
        return f"line_{item.digest}"
    prompt: object = item.prompt
    if isinstance(item.prompt, Chat):
        prompt = {name: value for name, value in asdict(item.prompt).items() if name != "join_parts"}  # of all lines
    asked = {
        "prompt": prompt,
        "params": asdict(item.params),
        "return_token_ids": item.return_token_ids,
        "echo": item.echo,
    }
    digest = hashlib.blake2b(engine.encode() + b"\n", digest_size=8)
    digest.update(json.dumps(asked, sort_keys=True).encode())
    return f"req_{digest.hexdigest()}"


def encode_row(
    row_id: str, custom_id: str | None, request_id: str, body: dict[str, Any] | None, error: str | None
) -> bytes:
    """One line with its end.

    Args:
        row_id: of this row alone.
        custom_id: of the line that is answered, or None where it had none.
        request_id: of the line (`request_id_of`).
        body: the answer, where there is one.
        error: why there is none.
    """
    row = {
        "id": f"batch_req_{row_id}",
        "custom_id": custom_id,
        "response": {
            "status_code": 200 if error is None else 400,
            "request_id": request_id,
            "body": None if body is None else {"id": f"{ID_PREFIXES[body['object']]}-{row_id}", **body},
        },
        "error": None if error is None else {"message": error, "type": "BadRequestError", "code": 400},
    }
    return json_line(row).encode() + b"\n"


class RowsThere:
    """What the rows of an output file answer. Memory: 24 to 72 bytes a row, in sets of hashes.

    Args:
        path: the output file, for messages.
        lines: of it.

    Attributes:
        num_rows: whole rows, each counted once.
        num_bytes: where the last whole row ends.

    Raises:
        FileExistsError: a line is no row of a run. A last one that a crash has torn is none, but passed over.
    """

    def __init__(self, path: Path, lines: Iterable[bytes] = ()) -> None:
        self._path = path
        self._rows, self._failed, self._answered = IdSet(), IdSet(), IdSet()
        self.num_rows = self.num_bytes = 0
        torn = 0
        for number, line in enumerate(lines, start=1):
            if torn:
                raise self._foreign(torn)
            row = _parse(line)
            if row is _NO_JSON:
                if not self.num_rows and not _is_start(line):
                    raise self._foreign(number)
                torn = number
            elif not _is_ours(row):
                raise self._foreign(number)
            elif not line.endswith(b"\n"):
                torn = number
            else:
                self._add(row)
                self.num_bytes += len(line)

    def has(self, item: BatchRequest | BadLine, request_id: str) -> bool:
        """Whether the row of a line of the input is there.

        Args:
            item: the line.
            request_id: of the line.

        Raises:
            FileExistsError: there is one of the same custom_id that answers something else.
        """
        if self.answers(item, request_id):
            return True
        is_repeat = isinstance(item, BadLine) and item.is_repeat
        if item.custom_id is not None and item.custom_id in self._answered and not is_repeat:
            raise FileExistsError(
                f"{self._path} has a row for {shown(item.custom_id)} that answers another request (its body, the model "
                f"or the dtype has changed, or another setting that changes answers): {WAY_OUT}"
            )
        return False

    def answers(self, item: BatchRequest | BadLine, request_id: str) -> bool:
        """Whether the row of a line is there, whatever others of its custom_id are."""
        return _key(item.custom_id, request_id) in self._rows

    def is_failed(self, item: BatchRequest | BadLine, request_id: str) -> bool:
        """Whether the row of a line is there and has an error."""
        return _key(item.custom_id, request_id) in self._failed

    def _add(self, row: dict[str, Any]) -> None:
        custom_id, request_id = row["custom_id"], row["response"]["request_id"]
        key = _key(custom_id, request_id)
        self.num_rows += self._rows.add(key)
        if row["error"] is not None:
            self._failed.add(key)
        if custom_id is not None and request_id.startswith("req_"):
            self._answered.add(custom_id)

    def _foreign(self, number: int) -> FileExistsError:
        return FileExistsError(f"{self._path}, line {number} is not a result row of run-batch: {WAY_OUT}")


def _parse(line: bytes) -> Any:
    try:
        return parse_json(line)
    except JsonError:
        return _NO_JSON


def _is_ours(row: Any) -> bool:
    """Whether a run has written it."""
    if not isinstance(row, dict) or not {"custom_id", "response", "error"} <= row.keys():
        return False
    custom_id, response = row["custom_id"], row["response"]
    request_id = response.get("request_id") if isinstance(response, dict) else None
    is_known = isinstance(request_id, str) and _REQUEST_ID.fullmatch(request_id) is not None
    return is_known and (custom_id is None or isinstance(custom_id, str))


def _is_start(line: bytes) -> bool:
    """Whether this may be what a crash left of a row; of a power cut, zeros."""
    return line.startswith(_START) or _START.startswith(line) or not line.strip(b"\0\n")


def _key(custom_id: str | None, request_id: str) -> str:
    return f"{request_id} {custom_id or ''}"

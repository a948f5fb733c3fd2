"""Bodies of requests in JSON."""

from __future__ import annotations

from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from flexgen_lite.http.errors import ApiError
from flexgen_lite.text.json_text import JsonError, parse_json
from flexgen_lite.text.shown import shown_text

MAX_BYTES = 64 << 20


async def read_json(request: HttpRequest) -> dict[str, Any]:
    """
    Raises:
        ApiError: it is none, or too large.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # what a foreign web page may send without asking is of another type
        raise ApiError(415, f"content-type is {shown_text(kind) or 'missing'}: send application/json")
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_BYTES:
                raise ApiError(413, f"the body has more than {MAX_BYTES} bytes: send less, or use a batch")
    except ClientDisconnect:
        raise ApiError(499, "the caller is gone") from None
    try:
        body = parse_json(bytes(data))
    except JsonError as error:
        raise ApiError(400, f"the body is {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    return body

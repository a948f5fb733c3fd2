"""Errors as the OpenAI API has them."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from flexgen_lite.http.json_response import JsonResponse
from flexgen_lite.text.shown import shown_text

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "service_unavailable"}


class ApiError(Exception):
    """
    Args:
        status: of HTTP.
        message: for the one who asked.
        param: the field that is wrong, if it is one.
    """

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, object]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "internal_server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.status}}


async def on_api_error(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    return JsonResponse(error.body(), error.status, headers)


async def on_http_error(request: HttpRequest, error: Exception) -> Response:
    """Unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path = shown_text(request.url.path)
    what = {404: f"there is no {path}", 405: f"{shown_text(request.method)} is not for {path}"}
    wrapped = ApiError(error.status_code, what.get(error.status_code, error.detail))
    return JsonResponse(wrapped.body(), error.status_code, error.headers)


async def on_failure(request: HttpRequest, error: Exception) -> Response:
    """What nobody foresaw: the log has it, the client a sentence."""
    return JsonResponse(ApiError(500, "the server failed: see its log").body(), 500)

"""The ASGI application: routes, keys, model names."""

from __future__ import annotations

import hmac
import os
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from flexgen_lite.client.client import Client
from flexgen_lite.errors import EngineError, NoStatus
from flexgen_lite.http.batch_store import BatchStore
from flexgen_lite.http.errors import ApiError, on_api_error, on_failure, on_http_error
from flexgen_lite.http.file_store import FileStore
from flexgen_lite.http.generate import Generation
from flexgen_lite.http.json_body import read_json
from flexgen_lite.http.json_response import JsonResponse
from flexgen_lite.http.metrics import text_of
from flexgen_lite.text.shown import shown

STATUS_SECONDS = 10.0
MOST_LISTED = 100
Handler = Callable[[HttpRequest], Awaitable[Response]]


class Api:
    """
    Args:
        connect: makes a client of the engine.
        data_dir: of files and batches.
        model_name: what the model is called; the engine's own name for it is taken too.
        api_key: callers of /v1 must have it; None: nobody is asked.

    Attributes:
        app: the ASGI application.
        batches: open ones are to be closed at the end.
    """

    def __init__(
        self, connect: Callable[[], Client], data_dir: Path, model_name: str | None = None, api_key: str | None = None
    ) -> None:
        self._client = connect()
        served = self._client.welcome.model
        self._model = model_name or served
        self._names = {self._model, served, os.path.basename(os.path.normpath(served))}
        self._started = int(time.time())
        self._files = FileStore(data_dir / "files")
        self.batches = BatchStore(data_dir / "batches", self._files, connect, self._model)
        generation = Generation(self._client, self._check_model, self._model)
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/v1/completions", generation.completions, methods=["POST"]),
            Route("/v1/chat/completions", generation.chat, methods=["POST"]),
            Route("/v1/files", self._upload, methods=["POST"]),
            Route("/v1/files", self._list_files),
            Route("/v1/files/{file_id}", self._file),
            Route("/v1/files/{file_id}", self._delete_file, methods=["DELETE"]),
            Route("/v1/files/{file_id}/content", self._content),
            Route("/v1/batches", self._create_batch, methods=["POST"]),
            Route("/v1/batches", self._list_batches),
            Route("/v1/batches/{batch_id}", self._batch),
            Route("/v1/batches/{batch_id}/cancel", self._cancel_batch, methods=["POST"]),
        ]
        self.app = Starlette(
            routes=routes,
            middleware=[Middleware(_OriginCheck), *([Middleware(_KeyCheck, api_key)] if api_key is not None else [])],
            exception_handlers={ApiError: on_api_error, HTTPException: on_http_error, Exception: on_failure},
        )

    # ------------------------------------------------------------------------------------------------ engine

    async def _health(self, caller: HttpRequest) -> Response:
        self._check_engine()
        try:
            await run_in_threadpool(self._client.wait_for_end, 0.0)
        except EngineError as error:
            raise ApiError(503, str(error)) from error
        return JsonResponse({"status": "ok"})

    async def _metrics(self, caller: HttpRequest) -> Response:
        self._check_engine()
        try:
            status = await run_in_threadpool(self._client.status, STATUS_SECONDS)
        except (EngineError, NoStatus) as error:
            raise ApiError(503, str(error)) from error
        return PlainTextResponse(text_of(status), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _check_engine(self) -> None:
        """Requests for answers wait while it is started again; who looks after the server is told."""
        if (outage := self._client.outage) is not None:
            raise ApiError(503, outage)

    async def _models(self, caller: HttpRequest) -> Response:
        return JsonResponse({"object": "list", "data": [self._about_model()]})

    async def _one_model(self, caller: HttpRequest) -> Response:
        self._check_model(caller.path_params["name"])
        return JsonResponse(self._about_model())

    def _about_model(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._started,
            "owned_by": "flexgen-lite",
            "max_model_len": self._client.welcome.max_length,
        }

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._names:
            raise ApiError(404, f"there is no model {shown(name)}: {shown(self._model)} is served", "model")

    # ------------------------------------------------------------------------------------------------ files

    async def _upload(self, caller: HttpRequest) -> Response:
        try:
            async with caller.form(max_files=1) as form:
                upload, purpose = form.get("file"), form.get("purpose")
                if not isinstance(upload, UploadFile):
                    raise ApiError(400, "file is missing", "file")
                if not isinstance(purpose, str):
                    raise ApiError(400, 'purpose is missing: "batch" for the input of a batch', "purpose")
                name = upload.filename or "file"
                stored = await run_in_threadpool(self._files.add, upload.file, name, purpose)
        except HTTPException as error:
            raise ApiError(400, f"the body is no form with a file: {error.detail}") from None
        except ClientDisconnect:
            raise ApiError(499, "the caller is gone") from None
        return JsonResponse(stored.to_json())

    async def _list_files(self, caller: HttpRequest) -> Response:
        files = await run_in_threadpool(self._files.list)
        purpose = caller.query_params.get("purpose")
        return _page(caller, [file.to_json() for file in files if purpose in (None, file.purpose)])

    async def _file(self, caller: HttpRequest) -> Response:
        return JsonResponse(self._files.get(caller.path_params["file_id"]).to_json())

    async def _delete_file(self, caller: HttpRequest) -> Response:
        file_id = caller.path_params["file_id"]
        await run_in_threadpool(self._files.delete, file_id)
        return JsonResponse({"id": file_id, "object": "file", "deleted": True})

    async def _content(self, caller: HttpRequest) -> Response:
        return FileResponse(self._files.path(caller.path_params["file_id"]), media_type="application/octet-stream")

    # ------------------------------------------------------------------------------------------------ batches

    async def _create_batch(self, caller: HttpRequest) -> Response:
        return JsonResponse(self.batches.create(await read_json(caller)).to_json())

    async def _list_batches(self, caller: HttpRequest) -> Response:
        return _page(caller, [batch.to_json() for batch in self.batches.list()])

    async def _batch(self, caller: HttpRequest) -> Response:
        return JsonResponse(self.batches.get(caller.path_params["batch_id"]).to_json())

    async def _cancel_batch(self, caller: HttpRequest) -> Response:
        return JsonResponse(self.batches.cancel(caller.path_params["batch_id"]).to_json())


def _page(caller: HttpRequest, items: list[dict[str, Any]]) -> Response:
    """A part of a list, as the API pages it: `limit` of them behind the one whose id is `after`."""
    after, limit = caller.query_params.get("after"), caller.query_params.get("limit", "20")
    if not re.fullmatch(r"[0-9]{1,4}", limit) or not 1 <= int(limit) <= MOST_LISTED:
        raise ApiError(400, f"limit is {shown(limit)}: give 1 to {MOST_LISTED}", "limit")
    if after is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise ApiError(400, f"after is {shown(after)}, which is not in the list", "after")
        items = items[ids.index(after) + 1 :]
    page = items[: int(limit)]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return JsonResponse({"object": "list", "data": page, "has_more": len(items) > len(page), **ends})


class _OriginCheck:
    """Lets no page of another server in a browser change anything: a form of its takes no leave."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            headers = dict(scope["headers"])
            origin, host = headers.get(b"origin"), headers.get(b"host", b"")
            if origin is not None and origin.partition(b"://")[2] != host:
                error = ApiError(403, "pages of other servers are not served: call from your own server")
                response = await on_api_error(HttpRequest(scope), error)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _KeyCheck:
    """Lets nobody at /v1 who does not have the key."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                error = ApiError(401, "the API key is missing or wrong: send `Authorization: Bearer KEY`")
                response = await on_api_error(HttpRequest(scope), error)
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

"""A job's events for a coroutine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request as HttpRequest

from flexgen_lite.client.client import Client
from flexgen_lite.client.completion import Completion, Delta
from flexgen_lite.client.request import Request
from flexgen_lite.errors import EngineError
from flexgen_lite.http.errors import ApiError


async def job_events(
    client: Client, requests: Sequence[Request], caller: HttpRequest
) -> AsyncIterator[Delta | Completion]:
    """Submits requests and yields what comes of them. The job is cancelled when the caller goes, or the reader.

    Raises:
        ApiError: the engine is gone.
    """
    loop, news = asyncio.get_running_loop(), asyncio.Event()

    def on_change() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            loop.call_soon_threadsafe(news.set)

    try:
        job = client.submit_requests(requests, len(requests), on_change=on_change)
    except EngineError as error:
        raise ApiError(503, str(error)) from error
    gone = asyncio.create_task(_until_gone(caller))
    gone.add_done_callback(lambda _: news.set())
    try:
        while not gone.done():
            await news.wait()
            news.clear()
            events, is_over = job.take_events()
            for event in events:
                yield event
            if is_over and not events:
                return
            if events:
                news.set()  # there may be more, or the end
    except EngineError as error:
        raise ApiError(503, str(error)) from error
    finally:
        gone.cancel()
        job.cancel(wait=False)


async def _until_gone(caller: HttpRequest) -> None:
    while (await caller.receive())["type"] != "http.disconnect":
        pass

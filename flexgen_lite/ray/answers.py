"""Requests of a batch in the engine's queue, awaited by a coroutine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from flexgen_lite.client.client import Client
from flexgen_lite.client.completion import Completion
from flexgen_lite.client.request import Request


async def answers(client: Client, requests: Sequence[Request]) -> list[Completion]:
    """In the order of the requests. The job is cancelled where the coroutine is.

    Raises:
        EngineError: the engine is gone for good.
    """
    loop, news, is_told = asyncio.get_running_loop(), asyncio.Event(), False

    def on_change() -> None:
        """On the client's thread: wakes the loop once for all that comes until it looks."""
        nonlocal is_told
        if not is_told:
            is_told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: the actor is going down
                loop.call_soon_threadsafe(news.set)

    job = client.submit_requests(requests, len(requests), on_change=on_change)
    found: list[Completion] = []
    is_over = False
    try:
        while not is_over:
            await news.wait()
            news.clear()
            is_told = False  # before looking: what comes from here on is told again
            events, is_over = job.take_events()
            found += [event for event in events if isinstance(event, Completion)]
    finally:
        job.cancel(wait=False)
    return sorted(found, key=lambda completion: completion.index)

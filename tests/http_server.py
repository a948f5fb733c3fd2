"""A `flexgen-lite serve` of the tests' own, and files for its batches."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

from tests.chat_model import make_chat_model

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def make_served_model(directory: Path) -> Path:
    """The demo's model with two chat templates."""
    model = make_chat_model(directory, TEMPLATE)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}" + TEMPLATE, encoding="utf-8")
    return model


@contextlib.contextmanager
def server(model: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The base URL and the process; it ends with the block if it has not before."""
    command = [sys.executable, "-m", "flexgen_lite", "serve", "--port", "0", "--ram", "2GiB", *options]
    process = subprocess.Popen(
        [*command, "--model", str(model), "--dtype", "float32"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/v1", line)
        assert found, line + (process.stderr.read() if process.wait(30) else "")
        yield found[0], process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=30)


def wait_for(client: openai.OpenAI, batch_id: str, *states: str) -> Any:
    for _ in range(600):
        batch = client.batches.retrieve(batch_id)
        if batch.status in states:
            return batch
        time.sleep(0.05)
    raise AssertionError(f"the batch stays {batch.status}")


def lines(count: int, first: int = 0, **body: Any) -> bytes:
    rows = [
        {
            "custom_id": str(n),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": f"{n}: ", **GREEDY, **body},
        }
        for n in range(first, first + count)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()

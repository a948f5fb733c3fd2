"""A look at a batch file before the engine is planned: how many sequences it asks for, and how long they are."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from flexgen_lite.batch.file import BatchRequest, read_requests
from flexgen_lite.batch.lines import open_lines
from flexgen_lite.batch.shard import WHOLE, Shard
from flexgen_lite.chat.template import Chat
from flexgen_lite.plan.workload import Workload

SAMPLE_LINES = 2000
READ_UP_TO = 4 << 30  # bytes of a file that is read beforehand
BYTES_PER_TOKEN = 3  # of text, on the low side: room for too many tokens is better than for too few


def survey(path: Path, shard: Shard = WHOLE) -> Workload | None:
    """Of the shard's lines; the longest one is that of the whole file. None where reading takes long or would use the
    file up, or where there is no good line among the first.
    """
    if not path.is_file() or path.stat().st_size > READ_UP_TO:
        return None
    with open_lines(path) as file:
        head = read_requests(itertools.islice(file, SAMPLE_LINES))
        requests = [item for item in head if isinstance(item, BatchRequest)]
    lines, longest_line = _measure(path)
    if not requests or not shard.num_lines(lines):
        return None
    lengths = sorted(_estimate(request) for request in requests)
    longest = [_estimate(item) for item in read_requests(iter([longest_line])) if isinstance(item, BatchRequest)]
    return Workload(
        sequences=shard.num_lines(lines),
        typical_tokens=lengths[len(lengths) * 9 // 10],
        longest_likely=max([*lengths, *longest]),
        longest_tokens=len(longest_line) + max(request.params.max_tokens for request in requests),
    )


def _estimate(request: BatchRequest) -> int:
    prompt = request.prompt
    if isinstance(prompt, Chat):
        prompt = json.dumps([*prompt.messages, *(prompt.tools or ())], ensure_ascii=False)
    tokens = len(prompt)
    if isinstance(prompt, str):
        tokens = len(prompt.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN + 1
    return tokens + request.params.max_tokens


def _measure(path: Path) -> tuple[int, bytes]:
    """Number of lines, and the longest one."""
    lines, longest = 0, b""
    with path.open("rb") as file:
        for line in file:
            lines += 1
            longest = max(longest, line, key=len)
    return lines, longest

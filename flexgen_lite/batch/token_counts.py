"""How many tokens the prompts of a batch file have."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from flexgen_lite.batch.file import BatchRequest, read_requests
from flexgen_lite.batch.lines import open_lines
from flexgen_lite.batch.survey import BYTES_PER_TOKEN
from flexgen_lite.chat.template import Chat, ChatError, render
from flexgen_lite.tokens.tokenizer import TextTokenizer
from flexgen_lite.wire.worker_messages import WireChatTemplate

MOST_COUNTED = 4000  # prompts; of a longer file others are taken to be like these


def count_tokens(
    path: Path, tokenizer_file: str | None, template: WireChatTemplate | None
) -> Iterator[tuple[int, int]]:
    """Tokens of the prompt and those that may be generated, of each good line, in their order. All lines of a file are
    read, and some of them counted.

    Args:
        tokenizer_file: a tokenizer.json; where there is none, tokens are estimated.
    """
    tokenizer = TextTokenizer(tokenizer_file) if tokenizer_file and Path(tokenizer_file).is_file() else None
    draw = random.Random(0)
    counted: list[tuple[int, int]] = []
    with open_lines(path) as lines:
        for item in read_requests(iter(lines)):
            if not isinstance(item, BatchRequest):
                continue
            if len(counted) < MOST_COUNTED:
                one = _prompt_tokens(item.prompt, tokenizer, template), item.params.max_tokens
                counted.append(one)
                yield from [one] * item.params.n
            else:
                yield from [draw.choice(counted)] * item.params.n


def _prompt_tokens(prompt: object, tokenizer: TextTokenizer | None, template: WireChatTemplate | None) -> int:
    if isinstance(prompt, Chat):
        try:
            text, has_special = render(prompt, template), True
        except ChatError:  # its line will fail
            text, has_special = json.dumps([*prompt.messages], ensure_ascii=False), False
    elif isinstance(prompt, str):
        text, has_special = prompt, False
    else:
        return len(prompt)  # type: ignore[arg-type]
    if tokenizer is None:
        return len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN + 1
    return max(1, len(tokenizer.encode(text, add_special_tokens=not has_special)))

"""How many tokens the prompts of a batch file have."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flexgen_lite.batch.file import BatchRequest, read_requests
from flexgen_lite.batch.lines import is_blank, open_lines
from flexgen_lite.batch.survey import BYTES_PER_TOKEN
from flexgen_lite.chat.template import Chat, ChatError, render
from flexgen_lite.tokens.tokenizer import TextTokenizer
from flexgen_lite.wire.worker_messages import WireChatTemplate

MOST_COUNTED = 4000  # lines
LONG_TEXT = 20_000  # characters


def count_tokens(path: Path, tokenizer_json: str, template: WireChatTemplate | None) -> Iterator[tuple[int, int, bool]]:
    """Tokens of the prompt, those that may be generated, and whether the prompt is scored, of each sequence of good
    lines, in their order. Lines behind the first MOST_COUNTED are taken to be as these.

    Args:
        tokenizer_json: a tokenizer.json's text; where there is none, and of long texts, tokens are estimated.
    """
    tokenizer = _tokenizer(tokenizer_json)
    draw = random.Random(0)
    counted: list[tuple[int, int, bool]] = []
    with open_lines(path) as lines:
        for item in read_requests(itertools.islice(lines, MOST_COUNTED)):
            if isinstance(item, BatchRequest):
                is_scored = item.params.prompt_logprobs is not None
                one = _prompt_tokens(item.prompt, tokenizer, template), item.params.max_tokens, is_scored
                counted += [one] * item.params.n
                yield from [one] * item.params.n
        for line in lines:
            if counted and not is_blank(line):
                yield draw.choice(counted)


def _tokenizer(text: str) -> TextTokenizer | None:
    if not text:
        return None
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".json") as file:
        file.write(text)
        file.flush()
        return TextTokenizer(file.name)


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
    if tokenizer is None or len(text) > LONG_TEXT:
        return len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN + 1
    return max(1, len(tokenizer.encode(text, add_special_tokens=not has_special)))

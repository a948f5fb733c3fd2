"""How many tokens the prompts of a batch file have, and how much of their beginnings others have as well."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

from flexgen_lite.batch.file import BatchRequest, read_requests
from flexgen_lite.batch.lines import is_blank, open_lines
from flexgen_lite.batch.shard import WHOLE, Shard
from flexgen_lite.batch.survey import BYTES_PER_TOKEN
from flexgen_lite.chat.template import Chat, ChatError, render
from flexgen_lite.tokens.tokenizer import TextTokenizer
from flexgen_lite.wire.worker_messages import WireChatTemplate

MOST_COUNTED = 4000  # lines
LONG_TEXT = 20_000  # characters
COMMON = 0.05  # of the prompts, that begin alike
STRETCH = 16  # lines in a row, of those that were counted
BLOCK = 16  # tokens, by which beginnings are compared


@dataclass(frozen=True, slots=True)
class Counted:
    """
    Attributes:
        prompt: tokens of it.
        max_tokens: those that may be generated.
        scored: whether the prompt is.
        shared: keys of the prompt's first blocks of BLOCK tokens, as far as other prompts begin with them.
        common: of these, the first ones that so many prompts have that those of the rest of a file have them, too.
        copy: of prompts with the same keys behind `common`, only those with the same number begin alike.
    """

    prompt: int
    max_tokens: int
    scored: bool
    shared: tuple[bytes, ...] = ()
    common: int = 0
    copy: int = 0


def count_tokens(
    path: Path, tokenizer_json: str, template: WireChatTemplate | None, shard: Shard = WHOLE
) -> Iterator[Counted]:
    """Of each sequence of the shard's good lines, in their order. Lines behind the first MOST_COUNTED of the shard are
    taken to be as these.

    Args:
        tokenizer_json: a tokenizer.json's text; where there is none, and of long texts, tokens are estimated.
    """
    tokenizer = _tokenizer(tokenizer_json)
    draw = random.Random(0)
    found: list[tuple[Counted, tuple[bytes, ...]]] = []
    users: Counter[bytes] = Counter()
    looked_at = MOST_COUNTED * shard.count
    with open_lines(path) as lines:
        for item in read_requests(itertools.islice(lines, looked_at), shard):
            if isinstance(item, BatchRequest):
                count, tokens = _prompt_tokens(item.prompt, tokenizer, template)
                one = Counted(count, item.params.max_tokens, item.params.prompt_logprobs is not None)
                keys = _block_keys(tokens)
                users.update(dict.fromkeys(keys, item.params.n))
                found += [(one, keys)] * item.params.n
        counted = _with_shared(found, users)
        yield from counted
        place = copy = 0
        for number, line in enumerate(lines, start=looked_at):
            if counted and shard.has(number) and not is_blank(line):
                if place % STRETCH == 0:  # neighbours may begin alike
                    place, copy = draw.randrange(-(-len(counted) // STRETCH)) * STRETCH, copy + 1
                one = counted[place % len(counted)]
                yield one if len(one.shared) == one.common else replace(one, copy=copy)
                place += 1


def _block_keys(tokens: Sequence[int]) -> tuple[bytes, ...]:
    keys, key = [], b""
    for first in range(0, len(tokens) - BLOCK + 1, BLOCK):
        key = blake2b(key + array("q", tokens[first : first + BLOCK]).tobytes(), digest_size=8).digest()
        keys.append(key)
    return tuple(keys)


def _with_shared(found: Sequence[tuple[Counted, tuple[bytes, ...]]], users: Counter[bytes]) -> list[Counted]:
    """Those that are alike are one object: a file may have millions."""
    made: dict[Counted, Counted] = {}
    counted = []
    for one, keys in found:
        shared = tuple(itertools.takewhile(lambda key: users[key] > 1, keys))
        common = sum(1 for _ in itertools.takewhile(lambda key: users[key] >= COMMON * len(found), shared))
        same = Counted(one.prompt, one.max_tokens, one.scored, shared, common)
        counted.append(made.setdefault(same, same))
    return counted


def _tokenizer(text: str) -> TextTokenizer | None:
    if not text:
        return None
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".json") as file:
        file.write(text)
        file.flush()
        return TextTokenizer(file.name)


def _prompt_tokens(
    prompt: object, tokenizer: TextTokenizer | None, template: WireChatTemplate | None
) -> tuple[int, Sequence[int]]:
    """How many, and which, where that is known."""
    if isinstance(prompt, Chat):
        try:
            text, has_special = render(prompt, template), True
        except ChatError:  # its line will fail
            text, has_special = json.dumps([*prompt.messages], ensure_ascii=False), False
    elif isinstance(prompt, str):
        text, has_special = prompt, False
    else:
        return len(prompt), prompt  # type: ignore[arg-type,return-value]
    if tokenizer is None or len(text) > LONG_TEXT:
        return len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN + 1, ()
    tokens = tokenizer.encode(text, add_special_tokens=not has_special)
    return max(1, len(tokens)), tokens

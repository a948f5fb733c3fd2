"""What is scored and continued: token ids, the same for every setting and peer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexgen_lite.demo import records
from flexgen_lite.demo.pretrained import MODEL

DOCS = Path(__file__).parents[2] / "docs"


@dataclasses.dataclass(frozen=True)
class Task:
    """Attributes:
    text: what it was made of, for people.
    windows: token ids whose probabilities are told, all but the first of each.
    prompts: token ids to be continued.
    max_tokens: generated after each prompt.
    ignore_eos: go on after the model's end of sequence.
    """

    text: str
    windows: list[list[int]]
    prompts: list[list[int]]
    max_tokens: int
    ignore_eos: bool = True

    @property
    def num_scored(self) -> int:
        return sum(len(window) - 1 for window in self.windows)


def prose_task(
    tokenizer: Any, name: str, text: str, num_tokens: int, window: int, prompts: int, prompt: int, max_tokens: int
) -> Task:
    """The first `num_tokens` of a text, in windows; prompts of `prompt` tokens from all over them."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:num_tokens]
    begin = begin_of(tokenizer)
    if len(ids) < prompt:
        raise ValueError(f"{name} has {len(ids)} tokens: give a text of more than the {prompt} of a prompt")
    told = f"{name}, {len(ids):,} tokens in windows of {window:,}"
    return Task(told, cut(ids, window, begin), excerpts(ids, prompts, prompt, begin), max_tokens)


def records_task(tokenizer: Any, num_tokens: int, prompts: int, max_tokens: int) -> Task:
    """Held-out records of the demonstration, a window each; the prompts are those the demonstration's model answers."""
    begin = begin_of(tokenizer)
    windows: list[list[int]] = []
    continued: list[list[int]] = []
    scored = 0
    for record in records.stream(0, "held_out"):
        if scored >= num_tokens and len(continued) >= prompts:
            break
        asked = [*begin, *tokenizer(records.prompt(record), add_special_tokens=False)["input_ids"]]
        answer = tokenizer(record.answer, add_special_tokens=False)["input_ids"]
        if scored < num_tokens:
            windows.append([*asked, *answer, tokenizer.eos_token_id])
            scored += len(windows[-1]) - 1
        if len(continued) < prompts:
            continued.append(asked)
    return Task(
        f"{len(windows)} records of the demonstration, {scored:,} tokens",
        windows,
        continued,
        max_tokens,
        ignore_eos=False,
    )


def is_demo_model(model: str) -> bool:
    return Path(model).resolve() == MODEL.resolve()


def docs_text() -> str:
    """English prose that is in every checkout; it changes from commit to commit."""
    return "\n\n".join(file.read_text(encoding="utf-8") for file in sorted(DOCS.glob("*.md")))


def begin_of(tokenizer: Any) -> list[int]:
    """The beginning of sequence, where the tokenizer has one."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def cut(ids: Sequence[int], window: int, begin: Sequence[int]) -> list[list[int]]:
    """Windows of `window` tokens, `begin` in front of each counted; the last may be shorter."""
    step = window - len(begin)
    parts = [[*begin, *ids[start : start + step]] for start in range(0, len(ids), step)]
    return [part for part in parts if len(part) > 1]


def excerpts(ids: Sequence[int], count: int, length: int, begin: Sequence[int]) -> list[list[int]]:
    """`count` pieces of `length` tokens, `begin` in front of each counted, evenly spread from the first to the last."""
    size = length - len(begin)
    last = len(ids) - size
    starts = [last * i // max(count - 1, 1) for i in range(count)]
    return [[*begin, *ids[start : start + size]] for start in starts]

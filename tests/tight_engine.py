"""Engines that have room for fewer tokens than they are given, and expect short answers: sequences are preempted."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite import Client, EngineConfig, EngineError, SamplingParams
from flexgen_lite.launcher.supervisor import EngineSupervisor
from flexgen_lite.plan.workload import Workload
from flexgen_lite.text.sizes import parse_size
from tests.tiny_models import VOCAB

SHORT = Workload(sequences=30, typical_tokens=16, longest_likely=32, longest_tokens=32)
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "micro_batches": 2, "micro_batch_tokens": 32, "max_sequences": 30,
    "attention_workers": 2, "attention_threads": 1, "page_tokens": 16,
}  # fmt: skip


@contextlib.contextmanager
def tight_engine(model: Path, *, extra: int = 0, **changes: Any) -> Iterator[tuple[EngineSupervisor, Client]]:
    """An engine with as few KV pages as it can have, and `extra` bytes, that has seen nothing but short answers."""
    settings = SETTINGS | changes
    with pytest.raises(EngineError) as refusal:
        EngineSupervisor(EngineConfig(model=str(model), ram=1 << 20, **settings), expected=SHORT)
    match = re.search(r"needs at least ([\d.]+ \w+) of RAM", str(refusal.value))
    assert match, refusal.value
    ram = parse_size(match[1].replace(" ", "")) + extra
    config = EngineConfig(model=str(model), ram=ram, **settings)
    with EngineSupervisor(config, expected=SHORT) as engine, Client(engine.endpoint) as client:
        expect_short_answers(client)
        yield engine, client


def expect_short_answers(client: Client) -> None:
    """From now on more sequences are admitted than have room."""
    stops = SamplingParams(max_tokens=200, temperature=0.0, stop_token_ids=[*range(VOCAB)])
    client.submit([[5]] * 100, stops).results()


def tokens_of(client: Client, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[list[int]]]:
    """Of each answer to each prompt."""
    completions = client.submit([list(prompt) for prompt in prompts], params).results()
    assert [completion.error for completion in completions] == [None] * len(prompts)
    return [[list(output.token_ids) for output in completion.outputs] for completion in completions]


def longer(params: SamplingParams, max_tokens: int) -> SamplingParams:
    return replace(params, max_tokens=max_tokens)

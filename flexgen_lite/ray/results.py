"""Completions as columns beside those that a batch of rows has. The columns have the same types whatever is in them, so
that batches can be put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from flexgen_lite.client.completion import Completion, Logprob
from flexgen_lite.ray.rows import ERROR

Outcome = Completion | str
"""Of a row: what came back, or why nothing was asked."""
Places = Sequence[Mapping[int, Logprob] | None]
_TOKENS = pa.list_(pa.int32())
_LOGPROB = pa.struct(
    [("token_id", pa.int32()), ("logprob", pa.float64()), ("rank", pa.int32()), ("decoded_token", pa.string())]
)
_PLACES = pa.list_(pa.list_(_LOGPROB))


def with_results(table: pa.Table, outcomes: Sequence[Outcome]) -> pa.Table:
    """The table with what came of its rows, in their order; a column that has the name of a new one gives way."""
    done = [outcome if isinstance(outcome, Completion) else None for outcome in outcomes]
    columns = {
        "generated_text": pa.array([completion.text if completion else "" for completion in done], pa.string()),
        "generated_tokens": pa.array([completion.token_ids if completion else [] for completion in done], _TOKENS),
        "num_input_tokens": pa.array([c.num_prompt_tokens if c else 0 for c in done], pa.int64()),
        "num_generated_tokens": pa.array([len(c.token_ids) if c else 0 for c in done], pa.int64()),
        "finish_reason": pa.array([c.finish_reason if c else "error" for c in done], pa.string()),
        ERROR: pa.array([error_of(outcome) for outcome in outcomes], pa.string()),
    }
    for name in ("logprobs", "prompt_logprobs"):
        found = [None if completion is None else getattr(completion, name) for completion in done]
        columns[name] = pa.array([None if places is None else _rows(places) for places in found], _PLACES)
    for name, column in columns.items():
        table = _put(table, name, column)
    return table


def error_of(outcome: Outcome) -> str:
    """Why the row failed; empty where it did not."""
    return outcome if isinstance(outcome, str) else outcome.error or ""


def _rows(places: Places) -> list[list[dict[str, Any]] | None]:
    """The token itself first; None for a prompt's first token, which has none."""
    return [None if place is None else [_row(token, logprob) for token, logprob in place.items()] for place in places]


def _row(token: int, found: Logprob) -> dict[str, Any]:
    return {"token_id": token, "logprob": found.logprob, "rank": found.rank, "decoded_token": found.decoded_token}


def _put(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    place = table.schema.get_field_index(name)
    return table.append_column(name, column) if place < 0 else table.set_column(place, name, column)

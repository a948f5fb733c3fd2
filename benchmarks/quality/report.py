"""The rows as a Markdown table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.quality.figures import Figures

HEAD = ("setting", "perplexity", "change", "greedy token kept", "mean difference of logprobs", "alike until")
EXPLANATION = """\
change: of the perplexity against bfloat16's in the same program, with its standard error. greedy token kept: share of
the tokens of our bfloat16's greedy answers that are the most likely ones here too, each after the same tokens; mean
difference of logprobs: absolute, of these tokens. alike until: share of the greedy tokens before the first that differs
from bfloat16's, each setting going on from its own tokens.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """`failure` says in one line why there are no figures."""

    title: str
    figures: Figures | None
    failure: str = ""


def table(rows: Sequence[Row]) -> str:
    """Lines of a Markdown table."""
    cells = [HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEAD))]
    rule = tuple("-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths))
    padded = [_line(line, widths) for line in (HEAD, rule, *cells[1:])]
    failures = [f"- {row.title}: {shortened(row.failure)}" for row in rows if row.failure]
    return "\n".join([*padded, *(["", *failures] if failures else [])]) + "\n"


def shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    _, *others = (text.rjust(width) for text, width in zip(texts, widths, strict=True))
    return f"| {' | '.join([texts[0].ljust(widths[0]), *others])} |"


def _cells(row: Row) -> tuple[str, ...]:
    found = row.figures
    if found is None:
        return (row.title, "failed", *["-"] * (len(HEAD) - 2))
    change = "-" if found.change is None else f"{found.change:+.2%}"
    return (
        row.title,
        f"{found.perplexity:.4f}",
        change if found.error is None else f"{change} ± {found.error:.2%}",
        f"{found.likeliest:.1%}",
        "-" if found.difference is None else f"{found.difference:.4f}",
        "-" if found.same is None else f"{found.same:.1%}",
    )

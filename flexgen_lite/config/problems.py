"""What is wrong with a configuration, in words: key, value and remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from flexgen_lite.text.shown import MAX_SHOWN, shown, shown_text

MOST_TOLD = 5  # problems in one message
MOST_NAMED = 20  # keys
Fields = Mapping[str, FieldInfo]


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names key, value and remedy.

    Attributes:
        problems: per key, what is wrong with it.
    """

    def __init__(self, problems: Mapping[str, str], origins: Mapping[str, str] | None = None) -> None:
        self.problems = dict(problems)
        origins = origins or {}
        told = [text + origins.get(key, "") for key, text in self.problems.items()]
        rest = [f"and {len(told) - MOST_TOLD} more"] if len(told) > MOST_TOLD else []
        super().__init__("; ".join([*told[:MOST_TOLD], *rest]))


def unknown_key(key: str, fields: Fields) -> str:
    return f"{shown_text(key)} is not a configuration key: {_nearest(key, fields)}"


def _nearest(key: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    names = list(known)
    close = get_close_matches(key[:MAX_SHOWN].replace("-", "_").lower(), names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    rest = f" and {len(names) - MOST_NAMED} more, see docs/configuration.md" if len(names) > MOST_NAMED else ""
    return f"the keys are {', '.join(names[:MOST_NAMED])}{rest}"


def refusal(key: str, value: object, fields: Fields) -> str:
    field = fields[key]
    wanted = field.json_schema_extra["expects"] if isinstance(field.json_schema_extra, dict) else ""
    return f"{key}={shown(value)} is not allowed: give {wanted}"


def problems_of(error: ValidationError, fields: Fields) -> dict[str, str]:
    """Per key, what a validation has found."""
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False):
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            problems.update(cause.problems)
            continue
        if not item["loc"]:
            problems.setdefault("config", "a key has characters that are not Unicode text: take it out")
            continue
        key = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            problems.setdefault(key, unknown_key(key, fields))
        elif item["type"] == "missing":
            problems.setdefault(key, f"{key} is missing: give {refusal(key, None, fields).rpartition(': give ')[2]}")
        else:
            problems.setdefault(key, refusal(key, item["input"], fields))
    return problems

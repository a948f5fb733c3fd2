"""What each system did with each of its options, kept in the cache, so that a later run can go on with the best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.peers.job import Options
from benchmarks.peers.trial import Outcome


class Tuning:
    """A `key` holds all that the best option depends on: system, shape, workload, versions, processor."""

    def __init__(self, cache: Path) -> None:
        self._file = cache / "tuning.json"
        self._tries: dict[str, list[dict[str, Any]]] = {}
        if self._file.exists():
            self._tries = json.loads(self._file.read_text(encoding="utf-8"))

    def known(self, key: str, options: Options) -> Outcome | None:
        return next((Outcome(**entry) for entry in self._tries.get(key, []) if entry["options"] == options), None)

    def add(self, key: str, outcome: Outcome) -> None:
        others = [entry for entry in self._tries.get(key, []) if entry["options"] != outcome.options]
        self._tries[key] = [*others, outcome.summary()]
        self._file.write_text(json.dumps(self._tries, indent=1), encoding="utf-8")


def best(tries: list[Outcome]) -> Options | None:
    """The options of the shortest run that came to its end; None if none did."""
    done = [outcome for outcome in tries if outcome.seconds is not None]
    return min(done, key=lambda outcome: outcome.seconds or 0.0).options if done else None

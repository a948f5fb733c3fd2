"""What several engines do at once, told as of one. Pure logic."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from flexgen_lite.wire.client_messages import Status


def status_of_all(
    statuses: Mapping[int, Status],
    count: int,
    waiting: int,
    totals: Mapping[str, int],
    own: Mapping[str, int],
    budget: int,
) -> Status:
    """
    Args:
        statuses: of engines, by their numbers, as they were last heard.
        count: engines that there are.
        waiting: requests that no engine has.
        totals: of requests and of engines started again, as those in front of the engines count them.
        own: memory of the process in front of them: bytes "planned", "used", "peak".
        budget: bytes of all of it.
    """
    found = list(statuses.values())
    memory = Counter({"used": own["used"]})
    for status in found:
        memory.update({name: status.memory.get(name, 0) for name in ("used", "gpu_peak") if name in status.memory})
    processes = {"dispatcher": dict(own)}
    for number, status in sorted(statuses.items()):
        processes |= {f"engine {number} {name}": sizes for name, sizes in status.processes.items()}
    return Status(
        running=sum(status.running for status in found),
        waiting=waiting + sum(status.waiting for status in found),
        done=totals["requests_done"],
        lanes={name: value / count for name, value in _sums([status.lanes for status in found]).items()},
        totals={**_totals(found, count), **{name: float(value) for name, value in totals.items()}},
        memory={"budget": budget, **memory},
        processes=processes,
    )


def without_work(status: Status) -> Status:
    """Of an engine that is gone: what it did, and nothing that it does."""
    lanes = dict.fromkeys(status.lanes, 0.0)
    return Status(0, 0, status.done, lanes, status.totals, {**status.memory, "used": 0}, {})


def _totals(statuses: Sequence[Status], count: int) -> dict[str, float]:
    """Counters are summed. Seconds are those of an engine on average: of so many, all worked at the same time."""
    found = _sums([status.totals for status in statuses])
    return {name: value / count if name.endswith("_seconds") else value for name, value in found.items()}


def _sums(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    sums: defaultdict[str, float] = defaultdict(float)
    for values in each:
        for name, value in values.items():
            sums[name] += value
    return dict(sums)

"""A prediction beside what became of it. Pure logic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from flexgen_lite.cost.job import JobTime

AS_PREDICTED = 0.1  # off at most, for a prediction to have been right
EXPLAINS = 1 / 3  # of the difference, for a lane to be named


@dataclass(frozen=True, slots=True)
class Prediction:
    """What is told of a job before it runs.

    Attributes:
        seconds: that its passes take.
        lanes: seconds in which each lane works.
        changes: (what would be changed, times as fast as without it), of those that can be.
    """

    seconds: float
    lanes: Mapping[str, float]
    changes: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, job: JobTime, changes: Mapping[str, JobTime]) -> Self:
        """`changes`: the same job, by what would be changed."""
        factors = {name: job.seconds / other.seconds for name, other in changes.items() if other.seconds > 0}
        lanes = {lane: share * job.seconds for lane, share in job.busy.items()}
        return cls(job.seconds, lanes, tuple(sorted(factors.items(), key=lambda item: -item[1])))

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "lanes": dict(self.lanes), "changes": [list(one) for one in self.changes]}

    @classmethod
    def from_dict(cls, values: object) -> Self | None:
        """None where they are none."""
        if not isinstance(values, Mapping):
            return None
        try:
            lanes = {str(lane): float(seconds) for lane, seconds in values["lanes"].items()}
            changes = tuple((str(name), float(factor)) for name, factor in values["changes"])
            return cls(float(values["seconds"]), lanes, changes)
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def where_they_part(predicted: Prediction, seconds: float, lanes: Mapping[str, float]) -> str:
    """One sentence.

    Args:
        seconds: that passes took.
        lanes: seconds in which each lane worked.
    """
    if seconds <= 0 or predicted.seconds <= 0:
        return ""
    ratio = seconds / predicted.seconds
    begin = f"{seconds:,.1f} s where {predicted.seconds:,.1f} were predicted, {ratio - 1:+.0%}"
    if abs(ratio - 1) <= AS_PREDICTED:
        return begin
    more = seconds - predicted.seconds
    off = {lane: lanes.get(lane, 0.0) - predicted.lanes.get(lane, 0.0) for lane in {*lanes, *predicted.lanes}}
    lane = max(off, key=lambda name: off[name] / more, default="")
    if not lane or off[lane] / more < EXPLAINS:
        return f"{begin}: no lane worked {'longer' if more > 0 else 'less'} by so much, it is what they waited"
    return (
        f"{begin}: they part at {lane}, which worked {lanes.get(lane, 0.0):,.1f} s, "
        f"predicted {predicted.lanes.get(lane, 0.0):,.1f}"
    )

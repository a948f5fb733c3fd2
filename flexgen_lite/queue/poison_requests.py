"""Which request makes workers fail: a pass that fails again and again is cut in halves until one stands alone."""

from __future__ import annotations

from collections.abc import Sequence

TRIES = 3


class PoisonRequests:
    """Told how passes end; says what the next one may hold. Pure logic.

    A pass is repeated as it is until it has failed TRIES times: most failures have nothing to do with what was
    computed. Then its requests are suspects, in two halves. While there are suspects, a pass holds one group of them
    and nothing else. A group that fails is halved at once, one whose pass ends is cleared; a single request that fails
    TRIES times is guilty. Where none is, the pass was too large: a lack of memory, mostly.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[int, ...]] = []  # the last one is next
        self._failures = 0  # of the present pass
        self._rows = 0  # of the pass that was cut in halves, while none of its requests was found guilty

    @property
    def group(self) -> frozenset[int] | None:
        """The requests that the next pass is confined to; None: any."""
        return frozenset(self._groups[-1]) if self._groups else None

    def passed(self) -> int:
        """The pass has ended with a result. Returns how many rows were too many, if that has come out; else 0."""
        self._failures = 0
        if not self._groups:
            return 0
        self._groups.pop()
        return 0 if self._groups else self._rows

    def skip(self) -> None:
        """Nothing of the group is left to be computed."""
        self._groups.pop()
        self._rows = 0  # whose fault it was remains open

    def failed(self, ids: Sequence[int], rows: int) -> tuple[bool, int | None]:
        """A pass with these requests and so many rows has failed: (whether it is to be repeated as it is, the guilty
        one if known)."""
        self._failures += 1
        if self._failures < (TRIES if not self._groups or len(ids) == 1 else 1):
            return True, None
        self._failures = 0
        if self._groups:
            self._groups.pop()
        else:
            self._rows = rows
        if len(ids) == 1:
            self._rows = 0
            return False, ids[0]
        middle = len(ids) // 2
        self._groups += [tuple(ids[middle:]), tuple(ids[:middle])]
        return False, None

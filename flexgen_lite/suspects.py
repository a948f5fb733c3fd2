"""Which request makes workers fail: a pass that fails again and again is cut in halves until one stands alone."""

from __future__ import annotations

from collections.abc import Sequence

TRIES = 3


class Suspects:
    """Told how passes end; says what the next one may hold. Pure logic.

    A pass is repeated as it is until it has failed TRIES times: most failures have nothing to do with what was
    computed. Then its requests are suspects, in two halves. While there are suspects, a pass holds one group of them
    and nothing else. A group that fails is halved at once, one whose pass ends is cleared; a single request that fails
    TRIES times is guilty.
    """

    def __init__(self) -> None:
        self._groups: list[tuple[int, ...]] = []  # the last one is next
        self._failures = 0  # of the present pass

    @property
    def group(self) -> frozenset[int] | None:
        """The requests that the next pass is confined to; None: any."""
        return frozenset(self._groups[-1]) if self._groups else None

    def passed(self) -> None:
        """The pass has ended with a result."""
        self._failures = 0
        self.skip()

    def skip(self) -> None:
        """Nothing of the group is left to be computed."""
        if self._groups:
            self._groups.pop()

    def failed(self, ids: Sequence[int]) -> tuple[bool, int | None]:
        """A pass with these requests has failed: (whether it is to be repeated as it is, the guilty one if known)."""
        self._failures += 1
        if self._failures < (TRIES if not self._groups or len(ids) == 1 else 1):
            return True, None
        self._failures = 0
        self.skip()
        if len(ids) == 1:
            return False, ids[0]
        middle = len(ids) // 2
        self._groups += [tuple(ids[middle:]), tuple(ids[:middle])]
        return False, None

"""How much of the KV cache a request is reckoned with when others are admitted beside it: pure logic."""

from __future__ import annotations

from flexgen_lite.queue.kv_on_disk import LEAST_BLOCKS, KvOnDisk
from flexgen_lite.queue.page_table import PageTable
from flexgen_lite.queue.running_request import RunningRequest

EXPECTED_MARGIN = 1.25  # over the average life
EXPECTED_WEIGHT = 0.02  # of the last request that ended, in the average
AHEAD = 8  # a sequence that could be parked is to have room for one token more for every so many that it has


class ExpectedLife:
    """A request is admitted if what it is expected to hold has room beside what is expected of the running ones.

    Where a preempted sequence is computed again, that is its whole life: its prompt, and of `max_tokens` the share that
    requests have used on average, with a margin; at first, and after each preemption, all of it.

    Where everything that runs could be parked on disk, it is what the sequence has and an AHEAD-th more, or a block,
    and as much as is parked rather than computed again: nobody waits for room that may never be used. Between an
    admission and the next preemption the sequences fill that room, so what is written and read of them is in proportion
    to what they generate, however long lives are (tests/property/test_parking_work.py).

    Args:
        disk: where sequences are parked; None: nowhere.
        max_sequences: most requests running at once.
    """

    def __init__(self, pages: PageTable, max_sequences: int, disk: KvOnDisk | None) -> None:
        self._pages, self._max_sequences, self._disk = pages, max_sequences, disk
        self.share = 1.0  # of max_tokens that a request generates

    def tokens(self, request: RunningRequest) -> int:
        """Of which K and V are expected to be stored."""
        size = self._pages.block_tokens
        if self._disk is not None and self._disk.holds(self._max_sequences):
            known = len(request.tokens)
            expected = max(known + max(size, known // AHEAD), (LEAST_BLOCKS + 1) * size)
        else:
            share = min(1.0, EXPECTED_MARGIN * self.share)
            generated = max(request.num_generated + size, int(share * request.params.max_tokens))
            expected = request.num_prompt_tokens + generated
        return min(expected, request.most_stored)

    def ended(self, request: RunningRequest) -> None:
        if request.params.max_tokens:
            share = request.num_generated / request.params.max_tokens
            self.share += (share - self.share) * EXPECTED_WEIGHT

    def preempted(self) -> None:
        """Too much was hoped for."""
        self.share = 1.0

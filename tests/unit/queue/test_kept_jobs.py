"""Results of kept jobs where the temporary files have no room."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flexgen_lite.client.sampling_params import GREEDY
from flexgen_lite.queue.kept_jobs import KeptJob
from flexgen_lite.wire.client_messages import RequestDone, WireOutput, WireRequest

LIMITED = """
import resource, signal
from tests.unit.queue.test_kept_jobs import check
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
check()
"""


def done(index: int) -> RequestDone:
    return RequestDone("job", index, 3, (WireOutput("text " * 100, (1, 2, 3), "stop", ()),), None)


def check() -> None:
    job = KeptJob()
    for index in range(10):
        assert job.submit(WireRequest(index, (1, 2, 3), GREEDY.to_wire())) is None
        job.add(done(index))
    for index in (9, 0, 5, 3, 9):
        assert job.result(index) == done(index)
    job.close()


@pytest.mark.parametrize("limited", [False, True])
def test_what_is_kept_comes_back(limited: bool) -> None:
    """A limit on files stands for a full disk: it takes what it has room for, and a part of what comes next."""
    if limited:
        subprocess.run([sys.executable, "-c", LIMITED], check=True)
    else:
        check()

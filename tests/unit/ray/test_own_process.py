"""Processors and priority of all threads of a process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from flexgen_lite.ray.own_process import bind_process

RISE = """
import os, threading
from flexgen_lite.ray.own_process import at_normal_priority
begun, go, found = threading.Event(), threading.Event(), []
def other():
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 12)
    begun.set()
    go.wait()
    found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
thread = threading.Thread(target=other)
thread.start()
begun.wait()
os.setpriority(os.PRIO_PROCESS, 0, 15)
allowed = at_normal_priority()
go.set()
thread.join()
print(allowed, os.getpriority(os.PRIO_PROCESS, 0), found[0])
"""


def test_all_threads_are_bound() -> None:
    before = os.sched_getaffinity(0)
    go, found = threading.Event(), []

    def other_thread() -> None:
        go.wait()
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=other_thread)
    thread.start()
    one = {min(before)}
    try:
        bind_process([*one])
        go.set()
        thread.join()
        assert found == [one]
        assert subprocess.run(["nproc"], capture_output=True, text=True, check=True).stdout.strip() == "1"
    finally:
        go.set()
        bind_process([*before])


def test_all_threads_run_at_normal_priority_where_that_is_allowed() -> None:
    done = subprocess.run([sys.executable, "-c", RISE], capture_output=True, text=True, check=True)
    assert done.stdout.split() in (["True", "0", "0"], ["False", "15", "12"])

"""What the engine is doing, in numbers: busy lanes, memory, counters."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from flexgen_lite import __version__
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.cost.comparison import Prediction
from flexgen_lite.engine.events import log
from flexgen_lite.engine.lanes import KV_TRACK, TRAFFIC_LANES, Lanes
from flexgen_lite.engine.setup import Setup
from flexgen_lite.engine.trace_file import TRAFFIC
from flexgen_lite.memory.usage import MemoryUse
from flexgen_lite.plan.plan import CUDA_CONTEXT_BYTES
from flexgen_lite.plan.text import describe
from flexgen_lite.text.sizes import format_size
from flexgen_lite.wire import worker_messages
from flexgen_lite.wire.client_messages import Status
from flexgen_lite.wire.kv_on_disk import KvMoved

LANE_SECONDS = 5.0  # over which busy shares are shown


class EngineStats:
    def __init__(self, lanes: Lanes, memory: MemoryUse) -> None:
        self.lanes = lanes
        self.memory = memory
        self.device_peak_bytes = 0  # of a GPU's memory
        self.copy_ns = 0  # of the compute worker's time, on copies from and to other processes
        self.traffic = dict.fromkeys(TRAFFIC_LANES, 0)
        self.kv_disk_bytes = {"kv_disk_written_bytes": 0, "kv_disk_read_bytes": 0}
        self._busy_ns = 0
        self._pass_start_ns: int | None = None
        self._history: list[tuple[int, dict[str, int]]] = []

    def close(self) -> None:
        self.lanes.close()
        self.memory.close()

    def pass_begins(self) -> None:
        now = self._pass_start_ns = time.monotonic_ns()
        if not self._history or now - self._history[-1][0] > LANE_SECONDS * 1e9:  # an idle time says nothing
            self._history = [(now, self.lanes.busy_ns)]
        if not self._busy_ns:
            self._trace_traffic(now)

    def pass_ends(self, name: str) -> None:
        assert self._pass_start_ns is not None
        now = time.monotonic_ns()
        self._busy_ns += now - self._pass_start_ns
        self.lanes.end_pass(name, self._pass_start_ns, now)
        self._pass_start_ns = None
        self._history.append((now, self.lanes.busy_ns))
        while len(self._history) > 2 and now - self._history[1][0] > LANE_SECONDS * 1e9:
            self._history.pop(0)

    def warn_of_memory(self) -> None:
        for name, used, planned in self.memory.beyond_plan():
            log(f"warning: {name} takes {format_size(used)} of memory where {format_size(planned)} were planned")

    # ------------------------------------------------------------------------------------------------ what was done

    def loaded(self, message: worker_messages.Loaded) -> None:
        self.traffic["disk_read_bytes"] += message.num_bytes
        self.lanes.add("disk", "disk", f"load {message.unit}", message.start_ns, message.end_ns)

    def kv_moved(self, message: KvMoved, name: str, is_written: bool) -> None:
        """KV was written to disk, or read."""
        self.kv_disk_bytes["kv_disk_written_bytes" if is_written else "kv_disk_read_bytes"] += message.num_bytes
        name = f"{name} {message.ticket}{' failed' if message.error else ''}"
        self.lanes.add("disk", KV_TRACK, name, message.start_ns, message.end_ns)

    def packed(self, message: worker_messages.Packed) -> None:
        self.lanes.span("compute worker", "compute", f"pack {message.unit}", message.start_ns, message.end_ns)

    def uploaded(self, message: worker_messages.Uploaded) -> None:
        self.traffic["uploaded_bytes"] += message.num_bytes
        name = f"upload {message.unit}"
        self.lanes.add("host-to-device", "host-to-device", name, message.start_ns, message.end_ns)

    def computed(self, report: worker_messages.ComputeReport, columns: Sequence[str]) -> None:
        """`columns`: their names."""
        if report.device_peak_bytes:
            self.device_peak_bytes = CUDA_CONTEXT_BYTES + report.device_peak_bytes
        for done in report.done:
            name = f"{'before ' * done.left_only}{columns[done.column]} micro-batch {done.micro_batch}"
            self.lanes.add("compute", "compute", name, done.start_ns, done.end_ns)
            if done.to_host_ns:
                self.lanes.add("device-to-host", "device-to-host", name, done.end_ns - done.to_host_ns, done.end_ns)
            self.copy_ns += done.copy_ns
            self.traffic["uploaded_bytes"] += done.uploaded_bytes

    def attended(self, worker: str, report: worker_messages.AttentionReport, columns: Sequence[str]) -> None:
        for done in report.done:
            name = f"{columns[done.column]} micro-batch {done.micro_batch}"
            self.lanes.add("attention", worker, name, done.start_ns, done.end_ns)

    # ------------------------------------------------------------------------------------------------ trace

    def trace_about(self, config: EngineConfig, setup: Setup, predicted: Prediction | None) -> None:
        """What the trace is of; nothing where none is written, as below."""
        if self.lanes.trace is not None:
            opened, made = setup.opened, setup.plan
            self.lanes.trace.about(
                {
                    "version": __version__,
                    "model": config.model,
                    "class": setup.spec.class_name,
                    "dtype": setup.spec.dtype,
                    "kv_dtype": setup.kv.dtype,
                    "device": opened.device_name,
                    "ram_bytes": made.ram,
                    "plan": describe(made, setup.spec),
                    "predicted": None if predicted is None else predicted.to_dict(),
                    "started_at": time.time(),
                    "started_at_us": time.monotonic_ns() / 1000,
                }
            )

    def trace_counters(self, running: int, waiting: int, totals: Mapping[str, int]) -> None:
        """At the end of a pass."""
        if self.lanes.trace is not None:
            trace, now = self.lanes.trace, time.monotonic_ns()
            trace.counter("memory, bytes", now, {"used": self.memory.used})
            trace.counter("sequences", now, {"running": running, "waiting": waiting})
            tokens = {name: totals.get(f"{name}_tokens", 0) for name in ("generated", "prompt")}
            trace.counter("tokens", now, tokens)
            trace.counter("requests", now, {"done": totals.get("requests_done", 0)})
            self._trace_traffic(now)

    def _trace_traffic(self, time_ns: int) -> None:
        if self.lanes.trace is not None:
            self.lanes.trace.counter(TRAFFIC, time_ns, self.traffic)

    def trace_loss(self, worker: str, why: str) -> None:
        if self.lanes.trace is not None:
            self.lanes.trace.instant(worker, f"lost: {why}", time.monotonic_ns())

    # ------------------------------------------------------------------------------------------------ status

    def status(self, running: int, waiting: int, totals: Mapping[str, int], budget: int) -> Status:
        """`budget`: of main memory, bytes."""
        now = time.monotonic_ns()
        since, busy = self._history[0] if self._history else (now, self.lanes.busy_ns)
        busy_now = self.lanes.busy_ns
        lanes = {name: min(1.0, (ns - busy.get(name, 0)) / max(1, now - since)) for name, ns in busy_now.items()}
        running_ns = 0 if self._pass_start_ns is None else now - self._pass_start_ns
        seconds = {
            "busy_seconds": (self._busy_ns + running_ns) / 1e9,
            "overhead_seconds": (self.lanes.overhead_ns + self.copy_ns) / 1e9,
            **{f"{name}_seconds": ns / 1e9 for name, ns in busy_now.items()},
        }
        moved = self.traffic | self.kv_disk_bytes
        used = self.memory.sample()
        processes = {
            name: {"planned": process.planned, "used": process.used, "peak": process.peak}
            for name, process in self.memory.processes.items()
        }
        return Status(
            running=running,
            waiting=waiting,
            done=totals.get("requests_done", 0),
            lanes=lanes,
            totals={name: float(value) for name, value in [*totals.items(), *moved.items()]} | seconds,
            memory={"budget": budget, "used": used, "peak": self.memory.peak}
            | ({"gpu_peak": self.device_peak_bytes} if self.device_peak_bytes else {}),
            processes=processes,
        )

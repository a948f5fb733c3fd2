"""GET /metrics, in Prometheus' text format."""

from __future__ import annotations

from flexgen_lite.wire.client_messages import Status

_COUNTERS = {
    "generated_tokens": "Tokens generated.",
    "prompt_tokens": "Tokens of prompts computed.",
    "shared_prompt_tokens": "Tokens of prompts that others which began alike had stored.",
    "requests_done": "Requests answered.",
    "requests_failed": "Requests refused or failed.",
    "requests_cancelled": "Requests cancelled.",
    "passes": "Passes through the model.",
    "restarts": "Workers started again.",
    "engine_restarts": "Engines started again.",
    "sent_back": "Running sequences that were preempted: others needed their KV pages.",
    "recomputed_tokens": "Tokens of preempted sequences computed again.",
    "parked_sequences": "Running sequences that were preempted and written to disk.",
    "fetched_sequences": "Of those, the ones that were read back and went on.",
    "disk_prefix_tokens": "Tokens of prompts that were read from disk.",
    "kv_disk_failures": "Writes and reads of KV that failed: what was not there was computed.",
    "kv_disk_written_bytes": "Bytes of KV written to disk.",
    "kv_disk_read_bytes": "Bytes of KV read from disk.",
    "disk_read_bytes": "Bytes of weights read from files.",
    "uploaded_bytes": "Bytes of weights copied to the device.",
    "kv_read_bytes": "Bytes of the KV cache read for sequences that generate.",
    "state_bytes": "Bytes of other state of sequences read and written.",
    "busy_seconds": "Seconds in which passes were running.",
    "overhead_seconds": "Seconds of passes in which no lane was busy, or only copied to another.",
}


def text_of(status: Status) -> str:
    """`status` as counters and gauges whose names begin with flexgen_lite_."""
    lines = []
    for name, meaning in _COUNTERS.items():
        lines += _family(f"{name}_total", "counter", meaning, {"": status.totals.get(name, 0.0)})
    lanes = {f'{{lane="{lane}"}}': status.totals.get(f"{lane}_seconds", 0.0) for lane in status.lanes}
    lines += _family("lane_busy_seconds_total", "counter", "Seconds in which a lane was busy.", lanes)
    shares = {f'{{lane="{lane}"}}': share for lane, share in status.lanes.items()}
    lines += _family("lane_busy_share", "gauge", "Share of the last seconds in which a lane was busy.", shares)
    requests = {'{state="running"}': float(status.running), '{state="waiting"}': float(status.waiting)}
    lines += _family("requests", "gauge", "Sequences that run or wait.", requests)
    memory = {f'{{kind="{kind}"}}': float(size) for kind, size in status.memory.items()}
    lines += _family("memory_bytes", "gauge", "Memory of the engine, and its budget.", memory)
    processes = {
        f'{{process="{name}",kind="{kind}"}}': float(size)
        for name, sizes in status.processes.items()
        for kind, size in sizes.items()
    }
    lines += _family("process_memory_bytes", "gauge", "Memory of each process, and its part of the plan.", processes)
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, meaning: str, values: dict[str, float]) -> list[str]:
    name = f"flexgen_lite_{name}"
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", *(f"{name}{at} {v:.10g}" for at, v in values.items())]

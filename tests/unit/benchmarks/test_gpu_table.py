"""What `python -m benchmarks.gpu compare` makes of its runs."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import gpu_table

RATES = {"host_to_device_gb_per_s": 50.0, "memory_read_gb_per_s": 100.0, "bfloat16_tflop_per_s": 700.0}
MOVED = {"uploaded_bytes": 450e9, "kv_read_bytes": 200e9, "flop": 70e12, "seconds": 10.0}


def run(options: list[str], timeout: float) -> dict[str, Any]:
    if options == ["rates"]:
        return RATES
    if "flexgen" in options:
        return {"error": "out of memory"}
    ours = options[options.index("--system") + 1] == "ours"
    rate = {"tokens_per_second": 120.0, "moved": MOVED} if ours else {"tokens_per_second": 10.0}
    return {**rate, "memory": {"gpu_peak": 12 << 30}}


def test_the_table(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_table, "_run", run)
    text = gpu_table.compare(["opt-6.7b"], 64, "16GiB", tmp_path / "out", 1.0)
    assert "| opt-6.7b | Accelerate, CPU offload | 10.00 | 12.00 | 12.0 GiB |" in text
    assert "failed: out of memory" in text
    assert "weights copied to the GPU | 45.0 GB/s | 90% |" in text
    assert "KV cache read by the CPU | 20.0 GB/s | 20% |" in text
    assert "products | 7.0 TFLOP/s | 1% |" in text
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") == text


def test_a_run_that_fails_has_its_last_words() -> None:
    assert "invalid choice" in gpu_table._run(["walk"], 60)["error"]

"""Dependencies point one way; pure logic knows no process, no socket and no tensor library."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PURE = (
    "slot_ring", "schedule", "batching", "running_request", "page_table", "model_spec", "exchange", "kv_layout",
    "messages", "client_messages", "sampling_wire", "stop_strings", "kept_logprobs", "open_request", "waiting_queue",
    "text_growth", "text_stream", "status_sum",
)  # fmt: skip
HEAVY = {"torch", "transformers", "numba", "greenlet"}
COORDINATOR_SIDE = sorted(p.stem for p in (ROOT / "flexgen_lite").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", PURE)
def test_pure_logic_is_pure(name: str) -> None:
    allowed = tuple(f"flexgen_lite.{module}" for module in PURE)
    foreign = {
        n
        for n in imported(ROOT / "flexgen_lite" / f"{name}.py")
        if n.split(".")[0]
        not in {"__future__", "array", "collections", "dataclasses", "typing", "math", "itertools", "hashlib"}
    }
    assert all(n.startswith(allowed) or n.removeprefix("flexgen_lite.").split(".")[0] in PURE for n in foreign), foreign


@pytest.mark.parametrize("name", COORDINATOR_SIDE)
def test_no_tensor_library_outside_the_workers(name: str) -> None:
    roots = {n.split(".")[0] for n in imported(ROOT / "flexgen_lite" / f"{name}.py")}
    assert not roots & HEAVY


@pytest.mark.parametrize("path", sorted((ROOT / "workers").glob("*.py")), ids=lambda path: path.stem)
def test_workers_do_not_know_the_coordinator(path: Path) -> None:
    forbidden = {
        "coordinator", "worker_process", "crew", "client", "llm", "cli", "engine_process", "requests", "batching",
    }  # fmt: skip
    used = {n.split(".")[1] for n in imported(path) if n.startswith("flexgen_lite.") and n.count(".")}
    assert not used & forbidden


@pytest.mark.parametrize("path", sorted((ROOT / "workers").glob("*.py")), ids=lambda path: path.stem)
def test_only_the_compute_worker_imports_torch(path: Path) -> None:
    small = {"loader", "loader_state", "disk_reader", "attention", "attention_state", "attention_kernels", "serve"}
    if path.stem in small:
        assert not {n.split(".")[0] for n in imported(path)} & {"torch", "transformers"}

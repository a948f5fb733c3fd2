"""Imports run one way: from what people call down to what everything stands on; what decides touches nothing."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = (
    ("cli",),
    ("lm_eval", "http", "ray"),
    ("llm",),
    ("dispatch",),
    ("launcher", "report"),
    ("batch",),
    ("openai", "demo"),
    ("client", "engine"),
    ("cost",),
    ("queue", "plan"),
    ("tokens", "chat", "schedule"),
    ("memory",),
    ("wire", "errors"),
    ("model", "config"),
    ("text",),
)
"""Of flexgen_lite/, from the roof down: a folder imports from itself and from the floors below."""
WORKER_FLOORS = (
    ("conversion",),
    ("loader", "attention", "compute"),
    ("model", "hadamard"),
    ("serve", "team", "simd"),
    ("kernel_cache",),
    ("zygote",),
)
OF_USE_TO_WORKERS = ("memory", "wire", "model", "text", "chat.environment", "schedule.segment_queue")
NOT_PURE = (
    "plan.machine",
    "plan.topology",
    "plan.disk_rate",
    "queue.kept_jobs",
)  # read what the machine has; keeps a file
PURE_ELSEWHERE = (
    "model.spec", "model.packing", "model.quantization", "memory.exchange", "memory.kv_layout", "memory.kv_groups",
    "wire.arena_specs", "wire.kv_on_disk",
    "wire.worker_messages", "wire.client_messages",
    "wire.sampling", "tokens.stop_strings", "tokens.detokenizer", "tokens.stream", "client.status_sum",
    "client.streamed_answer", "dispatch.status_of_all",
)  # fmt: skip
OF_PURE_ALONE = (
    "schedule.slot_ring", "schedule.zigzag", "queue.batching", "queue.micro_batch", "queue.running_request",
    "queue.page_table", "queue.kept_logprobs", "queue.open_request", "queue.waiting_queue", "queue.kv_on_disk",
    "queue.stored_prefixes", "queue.disk_slots", "queue.parked", "queue.expected_life", *PURE_ELSEWHERE,
)  # fmt: skip
"""Of ours they import each other alone, so that nothing comes in by a detour."""
PURE_MODULES = {
    "__future__", "array", "bisect", "collections", "collections.abc", "dataclasses", "hashlib", "heapq", "itertools",
    "math", "random", "statistics", "typing",
}  # fmt: skip
TENSORS = {"torch", "transformers", "numba", "greenlet"}


def modules(folder: Path, name: str) -> dict[str, Path]:
    """By their dotted names, with `name` for the folder."""
    paths = (path for path in folder.rglob("*.py") if "__pycache__" not in path.parts and path.name != "__init__.py")
    return {".".join((name, *path.relative_to(folder).with_suffix("").parts)): path for path in paths}


PACKAGE = {
    name: path
    for name, path in modules(ROOT / "flexgen_lite", "flexgen_lite").items()
    if not name.startswith("flexgen_lite.workers.")
}
WORKERS = modules(ROOT / "workers", "flexgen_lite.workers")


def imported(path: Path, in_functions: bool = True) -> set[str]:
    """Every module that the file imports; of `from a import b` a.b, where that is a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in ast.walk(tree) if in_functions else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names} & (PACKAGE.keys() | WORKERS.keys())
            names |= whole or {node.module}
    return names


def ours(path: Path) -> set[str]:
    return {name.removeprefix("flexgen_lite.") for name in imported(path) if name.startswith("flexgen_lite.")}


def floor_of(name: str, floors: tuple[tuple[str, ...], ...]) -> int:
    found = [number for number, folders in enumerate(floors) if name.split(".")[0] in folders]
    assert found, f"{name} is on no floor"
    return found[0]


@pytest.mark.parametrize("name", sorted(PACKAGE))
def test_imports_run_down(name: str) -> None:
    inner = name.removeprefix("flexgen_lite.")
    if inner == "__main__":
        return
    for used in ours(PACKAGE[name]):
        if inner in ("cli.doctor", "cli.quantize") and used.startswith("workers."):
            continue  # it looks for the GPU that a compute worker would find; it does without an engine
        same = used.split(".")[0] == inner.split(".")[0]
        assert same or floor_of(used, FLOORS) > floor_of(inner, FLOORS), used


@pytest.mark.parametrize("name", sorted(WORKERS))
def test_imports_of_workers_run_down(name: str) -> None:
    inner = name.removeprefix("flexgen_lite.workers.")
    if inner == "__main__":
        return
    for used in ours(WORKERS[name]):
        if not used.startswith("workers."):
            assert used.startswith(OF_USE_TO_WORKERS), used
            continue
        used = used.removeprefix("workers.")
        same = used.split(".")[0] == inner.split(".")[0]
        assert same or floor_of(used, WORKER_FLOORS) > floor_of(inner, WORKER_FLOORS), used


DECIDE = [name for name in sorted(PACKAGE) if name.split(".")[1] in ("queue", "schedule", "plan", "cost")]
PURE = [name for name in DECIDE if not name.endswith(NOT_PURE)]
PURE += [f"flexgen_lite.{name}" for name in (*PURE_ELSEWHERE, "dispatch.open_requests")]


@pytest.mark.parametrize("name", PURE)
def test_what_decides_is_pure(name: str) -> None:
    """No I/O, no clock, no thread, no tensor."""
    assert {module for module in imported(PACKAGE[name]) if not module.startswith("flexgen_lite.")} <= PURE_MODULES


@pytest.mark.parametrize("name", OF_PURE_ALONE)
def test_pure_logic_stands_on_pure_logic(name: str) -> None:
    assert ours(PACKAGE[f"flexgen_lite.{name}"]) <= {*OF_PURE_ALONE}


@pytest.mark.parametrize("name", sorted(PACKAGE))
def test_no_tensor_library_outside_the_workers(name: str) -> None:
    if not name.startswith(("flexgen_lite.demo.", "flexgen_lite.lm_eval.")):
        assert not {module.split(".")[0] for module in imported(PACKAGE[name])} & TENSORS


@pytest.mark.parametrize("name", [name for name in sorted(WORKERS) if ".loader." in name or ".attention." in name])
def test_only_the_compute_worker_imports_torch(name: str) -> None:
    assert not {module.split(".")[0] for module in imported(WORKERS[name])} & {"torch", "transformers"}


@pytest.mark.parametrize("folder", sorted({path.parent for path in (*PACKAGE.values(), *WORKERS.values())}), ids=str)
def test_a_folder_says_what_it_is_and_exports_nothing(folder: Path) -> None:
    if folder != ROOT / "flexgen_lite":
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        assert ast.get_docstring(tree)
        assert len(tree.body) == 1

"""Two engines of a machine, each on a CPU of its own, that map the same weights."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from flexgen_lite import Client, EngineConfig, EngineError, SamplingParams
from flexgen_lite.client.job import Job
from flexgen_lite.launcher.process import EngineProcess
from flexgen_lite.memory.arena import Arena
from flexgen_lite.model.quantization import Quantization
from flexgen_lite.plan.shared import IN_FRONT_BYTES
from flexgen_lite.plan.workload import Workload
from flexgen_lite.text.sizes import parse_size
from flexgen_lite.wire.engine_share import EngineShare, SharedWeights
from tests.e2e.test_quantization import rounded_tokens
from tests.engine_processes import workers_of
from tests.tiny_models import make_model, ragged_prompts, reference_tokens

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
MAX_TOKENS = 12
GREEDY = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
PROMPTS = ragged_prompts(12, longest=30)
SHORT = Workload(sequences=12, typical_tokens=42, longest_likely=42, longest_tokens=42)
CPUS = sorted(os.sched_getaffinity(0))
SETTINGS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "micro_batch_tokens": 64, "max_sequences": 7}


class Engines:
    """As whoever starts several engines has them: the arena, and what the first decided."""

    def __init__(self, model: Path, ram: int = 4 << 30, **options: Any) -> None:
        self.config = EngineConfig(model=str(model), **SETTINGS | options)
        self.ram = ram
        self.arena = Arena("shared")
        self.weights: SharedWeights | None = None
        self.log: list[str] = []
        self._running: dict[int, tuple[EngineProcess, Client]] = {}

    def start(self, number: int, **changes: Any) -> None:
        cpus = (CPUS[number % len(CPUS)],)
        share = EngineShare(number, 2, cpus, self.ram, self.arena.fd, self.weights)
        config = self.config.model_copy(update=changes)
        engine = EngineProcess(config, expected=SHORT, share=share, on_log=self.log.append)
        self.weights = SharedWeights.from_dict(engine.decided["weights"])
        self._running[number] = engine, Client(engine.endpoint)

    def stop(self, number: int) -> None:
        engine, client = self._running.pop(number)
        client.close()
        engine.stop()

    def engine(self, number: int) -> EngineProcess:
        return self._running[number][0]

    def client(self, number: int) -> Client:
        return self._running[number][1]

    def submit(self, number: int) -> Job:
        return self.client(number).submit(PROMPTS, GREEDY)

    def tokens(self) -> list[list[list[int]]]:
        """Of each engine, all at work at the same time."""
        return [tokens(job) for job in [self.submit(number) for number in sorted(self._running)]]

    def kill(self, number: int, worker: str) -> None:
        workers_of(self.engine(number).pid)[worker].send_signal(signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._running):
            self.stop(number)
        self.arena.close()


def tokens(job: Job) -> list[list[int]]:
    completions = job.results()
    assert [completion.error for completion in completions] == [None] * len(PROMPTS)
    return [list(completion.token_ids) for completion in completions]


@contextlib.contextmanager
def two_engines(model: Path, **options: Any) -> Iterator[Engines]:
    with Engines(model, **options) as engines:
        engines.start(0)
        engines.start(1)
        yield engines


def mappings(pid: int, name: str) -> list[tuple[str, int, str]]:
    """(access, bytes, inode) of what a process maps of an arena."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text(encoding="ascii").splitlines():
        if f"/memfd:flexgen-lite-{name} " in line:
            addresses, access, _, _, inode, *_ = line.split()
            begin, end = (int(address, 16) for address in addresses.split("-"))
            found.append((access, end - begin, inode))
    return found


def taken(pid: int, name: str) -> int:
    """Bytes of main memory that an arena of a coordinator has."""
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        if os.readlink(entry).startswith(f"/memfd:flexgen-lite-{name} "):
            return os.stat(entry).st_blocks * 512
    raise AssertionError(f"process {pid} has no arena {name}")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return reference_tokens(model, PROMPTS, MAX_TOKENS)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"layer_slots": 2}),
        ("opt", {"layer_slots": 3, "attention_workers": 2}),
        ("qwen3-moe", {}),
        ("llama", {"stage_weights": True, "device_slots": 3}),
        ("llama", {"stage_weights": True, "layer_slots": 2, "cpu_projections": "qkv"}),
    ],
    ids=str,
)
def test_both_give_the_tokens_of_transformers(
    family: str, options: dict[str, Any], model: Path, expected: list[list[int]], runtime: Path, tmp_path: Path
) -> None:
    if family != "llama":
        model = make_model(family, tmp_path)
        expected = reference_tokens(model, PROMPTS, MAX_TOKENS)
    with two_engines(model, **options) as engines:
        assert engines.tokens() == [expected] * 2
        weights = engines.weights
        assert weights is not None
        assert len(weights.resident_layers) == (0 if "layer_slots" in options else 4)
        for number in (0, 1):
            engine = engines.engine(number)
            assert engine.decided["max_sequences"] == 7
            workers = workers_of(engine.pid)
            for worker in (engine.pid, *(process.pid for process in workers.values())):
                assert os.sched_getaffinity(worker) == {CPUS[number % len(CPUS)]}
            for name in ("compute worker", "disk loader"):
                ((access, num_bytes, inode),) = mappings(workers[name].pid, "shared")
                assert (access, num_bytes) == ("r--s" if number else "rw-s", weights.num_bytes)
                assert int(inode) == os.fstat(engines.arena.fd).st_ino
        assert 0 < os.fstat(engines.arena.fd).st_blocks * 512 <= weights.num_bytes
        streams = "layer_slots" in options
        assert [taken(engines.engine(number).pid, "weights") > 0 for number in (0, 1)] == [streams] * 2


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_weights_in_8_bits(family: str, runtime: Path, tmp_path: Path) -> None:
    model = make_model(family, tmp_path)
    expected = rounded_tokens(model, PROMPTS, Quantization(8))
    with two_engines(model, quantization="int8") as engines:
        assert engines.tokens() == [expected] * 2
        engines.kill(1, "compute worker")
        assert engines.tokens() == [expected] * 2


def test_some_layers_stay_and_the_others_stream_in_each(runtime: Path, tmp_path: Path) -> None:
    """Layers of 25 MB, in a budget with room for some of them. The one told is rounded, to up to 100 MiB more."""
    model = make_model("llama", tmp_path, intermediate_size=1 << 15, num_hidden_layers=14)
    expected = reference_tokens(model, PROMPTS, MAX_TOKENS)
    with Engines(model, ram=MIB) as engines:
        with pytest.raises(EngineError) as refusal:
            engines.start(0)
        match = re.search(
            r"LlamaForCausalLM in 2 engines needs at least (\S+ \w+) of RAM, 129.0 MiB allowed: "
            r"raise ram, or lower engines",
            str(refusal.value),
        )
        assert match, refusal.value
        engines.ram = parse_size(match[1].replace(" ", "")) - IN_FRONT_BYTES + 80 * MIB
        engines.start(0)
        engines.start(1)
        weights = engines.weights
        assert weights is not None and 0 < len(weights.resident_layers) < 10, weights
        assert engines.tokens() == [expected] * 2
        budgets = [engines.client(number).status().memory["budget"] for number in (0, 1)]
        assert sum(budgets) <= engines.ram and budgets[0] - budgets[1] > weights.num_bytes - MIB
        engines.kill(1, "disk loader")
        engines.kill(0, "compute worker")
        assert engines.tokens() == [expected] * 2
        assert f"{len(weights.resident_layers)} of 14 layers in RAM" in engines.engine(1).plan
        assert "are there once, for all engines" in engines.engine(1).plan


def test_what_is_shared_is_counted_once(runtime: Path, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path, intermediate_size=1 << 14)
    with two_engines(model) as engines:
        engines.tokens()
        used = []
        for number in (0, 1):
            pid, memory = engines.engine(number).pid, engines.client(number).status()
            own = sum(taken(pid, name) for name in ("weights", "kv", "exchange", "states"))
            used.append(memory.memory["used"] - sum(process["used"] for process in memory.processes.values()) - own)
        assert used[0] - used[1] > 40 * MIB


@pytest.mark.parametrize("worker", ["compute worker", "disk loader", "attention worker 0"])
@pytest.mark.parametrize("options", [{}, {"layer_slots": 2}], ids=str)
def test_a_worker_of_either_is_lost(
    worker: str, options: dict[str, Any], model: Path, expected: list[list[int]], runtime: Path
) -> None:
    with two_engines(model, **options) as engines:
        for number in (0, 1):
            jobs = [engines.submit(0), engines.submit(1)]
            engines.kill(number, worker)
            assert [tokens(job) for job in jobs] == [expected] * 2
        assert [engines.client(number).status().totals["restarts"] for number in (0, 1)] == [1, 1]


def test_an_engine_is_lost_and_started_again(model: Path, expected: list[list[int]], runtime: Path) -> None:
    """It reads nothing of what is there; the other one goes on."""
    with two_engines(model) as engines:
        for number in (0, 1):
            job = engines.submit(1 - number)
            os.killpg(engines.engine(number).pid, signal.SIGKILL)
            assert tokens(job) == expected
            engines.engine(number).end(10)
            engines.stop(number)
            engines.start(number)
            assert engines.tokens() == [expected] * 2
            assert taken(engines.engine(number).pid, "weights") == 0
            for name in ("compute worker", "disk loader"):
                ((access, *_),) = mappings(workers_of(engines.engine(number).pid)[name].pid, "shared")
                assert access == "r--s"


def test_an_engine_that_reads_them_otherwise_does_not_start(
    model: Path, expected: list[list[int]], runtime: Path
) -> None:
    with Engines(model) as engines:
        engines.start(0)
        with pytest.raises(EngineError, match="changed while engines were using it") as error:
            engines.start(1, max_model_len=64, quantization="int8")
        assert error.value.user_error
        engines.start(1)
        assert engines.tokens() == [expected] * 2


def test_bfloat16_in_the_order_of_products(model: Path, runtime: Path) -> None:
    """Weights of 16 bits are put in panels by the first engine, if at all."""
    with two_engines(model, dtype="bfloat16") as engines:
        first, second = engines.tokens()
        assert first == second
        engines.kill(1, "compute worker")
        assert engines.tokens() == [first] * 2

"""Deaths that end the engine: told plainly, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from flexgen_lite import FlexGenLite, SamplingParams
from tests.engine_processes import survivors, workers_of
from tests.tiny_models import make_model, ragged_prompts

pytestmark = pytest.mark.usefixtures("own_zygotes")
NOTICE_SECONDS = 2.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("opt", tmp_path_factory.mktemp("opt"))


def processes_of(engine: FlexGenLite) -> dict[str, psutil.Process]:
    """The engine's processes by the names that it gives them."""
    return {"coordinator": psutil.Process(engine.engine_pid), **workers_of(engine.engine_pid)}


def test_a_worker_that_dies_at_start_leaves_its_last_words(model: Path, runtime: Path, tmp_path: Path) -> None:
    """A broken numba stands for whatever may be wrong with an installation."""
    broken = tmp_path / "broken" / "numba"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('numba is broken here')")
    code = (
        "import sys; from flexgen_lite import FlexGenLite\n"
        "try: FlexGenLite(sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(broken.parent)}
    run = subprocess.run(
        [sys.executable, "-c", code, str(model)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert "EngineError" in run.stdout and "attention worker 0" in run.stdout and "numba is broken here" in run.stdout


OWNER = """
import sys
from flexgen_lite import FlexGenLite, SamplingParams
engine = FlexGenLite(sys.argv[1], attention_workers=2, attention_threads=1, layer_slots=2)
print(engine._engine.pid, flush=True)
engine.generate([[3, 4, 5]] * 20, SamplingParams(max_tokens=100, ignore_eos=True))
print("done", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("victim", ["coordinator", "owner"])
def test_nothing_survives_a_killed_coordinator_or_owner(victim: str, model: Path, runtime: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(model)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert owner.stdout is not None
    coordinator = psutil.Process(int(owner.stdout.readline()))
    workers = coordinator.children(recursive=True)
    assert len(workers) == 5
    target = coordinator if victim == "coordinator" else psutil.Process(owner.pid)
    target.kill()
    patience = NOTICE_SECONDS if victim == "coordinator" else NOTICE_SECONDS + 8  # in the latter case all end in order
    assert not survivors([*workers, coordinator], patience)
    owner.kill()
    owner.communicate(timeout=20)
    # A killed owner cannot tidy up: the next start does.
    code = "from flexgen_lite.wire.runtime_dir import RuntimeDir; RuntimeDir().remove()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_only_the_compute_worker_loads_torch(model: Path, runtime: Path) -> None:
    """What the others weigh is taken from the user's budget."""
    with FlexGenLite(model, attention_workers=2, attention_threads=1) as engine:
        engine.generate(ragged_prompts(4, longest=20), SamplingParams(max_tokens=4))
        processes = processes_of(engine)
        for name, process in processes.items():
            libraries = Path(f"/proc/{process.pid}/maps").read_text()
            assert ("libtorch" in libraries) == (name == "compute worker"), name
        resident = {
            name: process.memory_info().rss - process.memory_info().shared for name, process in processes.items()
        }
    assert resident["coordinator"] < 120e6
    assert resident["disk loader"] < 60e6
    assert resident["attention worker 0"] < 150e6

"""A small Ray on this machine for the tests in this folder, which are there where Ray is: `make test-ray`."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chat_model import make_quick_model
from tests.tiny_models import make_model

HAS_RAY = importlib.util.find_spec("ray") is not None
collect_ignore_glob = [] if HAS_RAY else ["test_*.py"]
ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %} =>{% endif %}"


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Four processors by Ray's count, whatever the machine has: two actors and what reads and writes have room."""
    import ray
    import ray.data

    os.environ["PYTHONPATH"] = str(ROOT)  # of the actors, which are no children of this process
    ray.data.DataContext.get_current().enable_progress_bars = False
    with tempfile.TemporaryDirectory(prefix="fgr-", dir="/tmp") as folder:  # sockets want a short path
        ray.init(
            num_cpus=4, include_dashboard=False, object_store_memory=200 << 20, _temp_dir=folder,
            _memory=8 << 30, logging_level="warning",
        )  # fmt: skip
        try:
            yield
        finally:
            ray.shutdown()


@pytest.fixture
def no_engines(cluster: None) -> None:
    """Those of an earlier test are gone."""
    from tests.ray.pipelines import until_engines_are_gone

    until_engines_are_gone()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, no tokenizer."""
    return make_model("opt", tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, a tokenizer and a chat template."""
    return make_quick_model(tmp_path_factory.mktemp("quick"), TEMPLATE)

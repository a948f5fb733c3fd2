"""What is refused before any actor starts."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite.config.problems import ConfigError
from flexgen_lite.ray.config import FlexGenLiteProcessorConfig


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"batch_size": 0}, "batch_size=0 is not allowed: give a whole number from 1 up"),
        ({"max_concurrent_batches": 2.0}, "max_concurrent_batches=2.0"),
        ({"max_tasks_in_flight_per_actor": 0}, "max_tasks_in_flight_per_actor=0"),
        ({"concurrency": 0}, r"concurrency=0 is not allowed: give a number of actors, or \(least, most\)"),
        ({"concurrency": (3, 2)}, r"concurrency=\(3, 2\)"),
        ({"num_cpus": -1}, "num_cpus=-1"),
        ({"num_gpus": True}, "num_gpus=True"),
        ({"max_restarts": -2}, "max_restarts=-2 is not allowed: give a whole number, or -1"),
        ({"engine_kwargs": {"model": "other"}}, "give it as model_source"),
        ({"engine_kwargs": None}, "engine_kwargs=None is not allowed: give a dict with names as keys"),
        ({"engine_kwargs": {5: 1}}, r"engine_kwargs=\{5: 1\} is not allowed"),
        ({"runtime_env": [1]}, r"runtime_env=\[1\] is not allowed"),
        ({"num_cpus": float("nan")}, "num_cpus=nan is not allowed: give a number from 0 up"),
        ({"apply_chat_template": "no"}, "apply_chat_template='no' is not allowed: give True or False"),
        ({"should_continue_on_error": 1}, "should_continue_on_error=1 is not allowed"),
        ({"chat_template": 5}, "chat_template=5 is not allowed: give a text"),
        ({"engine_kwargs": {"max_num_seqs": 8}}, "max_num_seqs is not a configuration key: did you mean"),
        ({"engine_kwargs": {"ram": "lots"}}, "ram='lots' is not allowed"),
    ],
)
def test_what_cannot_be_used(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FlexGenLiteProcessorConfig(model_source="m", **values)


@pytest.mark.parametrize("given", [None, 5, ""])
def test_what_is_no_model(given: Any) -> None:
    with pytest.raises(ConfigError, match=f"model_source={given!r} is not allowed: give a model directory or a hub id"):
        FlexGenLiteProcessorConfig(model_source=given)


def test_a_path_is_a_model() -> None:
    config = FlexGenLiteProcessorConfig(model_source=Path("folder/model"))
    assert config.model_source == config.engine_config().model == "folder/model"


def test_engine_options_of_the_user_win() -> None:
    config = FlexGenLiteProcessorConfig(model_source="m", engine_kwargs={"ram": 5, "dtype": "float32"})
    made = config.engine_config(ram=7, max_sequences=9)
    assert (made.model, made.ram, made.dtype, made.max_sequences) == ("m", 5, "float32", 9)


def test_actors_get_it() -> None:
    config = FlexGenLiteProcessorConfig(model_source="m", engine_kwargs={"ram": 5}, concurrency=(1, 3))
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.least_and_most == (1, 3)
    assert FlexGenLiteProcessorConfig(model_source="m", concurrency=2).least_and_most == (2, 2)

"""What is refused before any actor starts."""

from __future__ import annotations

import pickle
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
        ({"engine_kwargs": {"max_num_seqs": 8}}, "max_num_seqs is not a configuration key: did you mean"),
        ({"engine_kwargs": {"ram": "lots"}}, "ram='lots' is not allowed"),
    ],
)
def test_what_cannot_be_used(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        FlexGenLiteProcessorConfig(model_source="m", **values)


def test_engine_options_of_the_user_win() -> None:
    config = FlexGenLiteProcessorConfig(model_source="m", engine_kwargs={"ram": 5, "dtype": "float32"})
    made = config.engine_config(ram=7, max_sequences=9)
    assert (made.model, made.ram, made.dtype, made.max_sequences) == ("m", 5, "float32", 9)


def test_actors_get_it() -> None:
    config = FlexGenLiteProcessorConfig(model_source="m", engine_kwargs={"ram": 5}, concurrency=(1, 3))
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.least_and_most == (1, 3)
    assert FlexGenLiteProcessorConfig(model_source="m", concurrency=2).least_and_most == (2, 2)

"""The configuration: strict, with errors that name key, value and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flexgen_lite.config.engine import EngineConfig, parse_setting
from flexgen_lite.config.problems import ConfigError
from flexgen_lite.config.reference import reference

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def test_defaults_are_auto() -> None:
    config = EngineConfig(model="m")
    chosen = config.model_dump(
        exclude={"model", "dtype", "kv_dtype", "device", "load_format", "engines", "start_timeout", "worker_timeout"}
        | {"quantization", "activations", "cpu_projections"}
    )
    assert set(chosen.values()) == {None}
    assert {config.dtype, config.kv_dtype, config.device, config.load_format} == {"auto"}
    assert {config.quantization, config.activations, config.cpu_projections} == {"auto"}


def test_auto_can_be_written_everywhere() -> None:
    given = {name: "auto" for name in EngineConfig.model_fields if not name.endswith("_timeout")}
    config = EngineConfig(**{**given, "model": "m", "trace": None, "key_file": None})
    assert config == EngineConfig(model="m", engines="auto")


def test_values_are_read_as_people_write_them() -> None:
    config = EngineConfig(
        model="m", ram="1.5GiB", gpu=10, attention_cpus=[[0, 1], "2-3,8"], compute_cpus="4", trace="t.json"
    )
    assert (config.ram, config.gpu) == (3 << 29, 10)
    assert config.attention_cpus == ((0, 1), (2, 3, 8))
    assert config.compute_cpus == (4,)
    assert config.trace == Path("t.json")


def test_a_place_for_nothing_is_refused() -> None:
    config = EngineConfig(model="m", kv_disk="200GiB", kv_disk_dir="/fast/disk")
    assert (config.kv_disk, config.kv_disk_dir) == (200 << 30, Path("/fast/disk"))
    with pytest.raises(ConfigError, match="kv_disk_dir='/fast/disk' has no effect without kv_disk: give kv_disk"):
        EngineConfig(model="m", kv_disk_dir="/fast/disk")


def test_json_round_trip() -> None:
    config = EngineConfig(model="m", ram="8GiB", attention_cpus=[[0], [1]], trace="t", stage_weights=False)
    assert EngineConfig.from_json(config.to_json()) == config


def test_it_is_frozen() -> None:
    config = EngineConfig(model="m")
    with pytest.raises(ValueError, match="frozen"):
        config.ram = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", ""),
        ("model", 3),
        ("dtype", "int8"),
        ("kv_dtype", "fp8"),
        ("cpu_projections", "mlp"),
        ("kv_disk", 0),
        ("kv_disk", "much"),
        ("kv_disk_dir", ""),
        ("kv_disk_dir", 3),
        ("device", "tpu"),
        ("device", "cuda:x"),
        ("load_format", "safetensors"),
        ("ram", "lots"),
        ("ram", 0),
        ("gpu", -1),
        ("max_model_len", 0),
        ("micro_batches", "4"),
        ("micro_batches", 1.5),
        ("micro_batches", True),
        ("page_tokens", 12),
        ("page_tokens", 512),
        ("layer_slots", 1),
        ("attention_workers", 0),
        ("attention_cpus", [0, 1]),
        ("attention_cpus", []),
        ("compute_cpus", [1, 1]),
        ("compute_cpus", "5-3"),
        ("loader_cpus", [-1]),
        ("stage_weights", 1),
        ("trace", 5),
        ("endpoint", "tcp://127.0.0.1"),
        ("endpoint", "udp://127.0.0.1:5555"),
        ("endpoint", "ipc://"),
        ("endpoint", "ipc:///" + "x" * 107),
        ("engines", 0),
        ("engines", 65),
        ("engines", True),
        ("engines", "two"),
        ("start_timeout", 0),
        ("worker_timeout", float("nan")),
        ("worker_timeout", "soon"),
    ],
)
def test_an_impossible_value_names_key_value_and_remedy(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}=.* is not allowed: give .") as caught:
        EngineConfig(**{"model": "m", key: value})
    assert "\n" not in str(caught.value)
    assert repr(value)[:60] in str(caught.value)
    assert set(caught.value.problems) == {key}


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="atention_worker is not a configuration key: did you mean attention_workers"):
        EngineConfig(model="m", atention_worker=2)
    with pytest.raises(ConfigError, match="zzz is not a configuration key: the keys are model, dtype"):
        EngineConfig(model="m", zzz=2)


def test_a_missing_model() -> None:
    with pytest.raises(ConfigError, match="model is missing: give a model directory or a hub id"):
        EngineConfig()


def test_one_set_of_cpus_for_each_attention_worker() -> None:
    with pytest.raises(ConfigError, match="attention_cpus has 1 entries for attention_workers=2"):
        EngineConfig(model="m", attention_workers=2, attention_cpus=[[0]])


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("ram: 1GiB\nlayer_slots: 3\n")
    config = EngineConfig.load(file, {"model": "m", "ram": "2GiB"})
    assert (config.ram, config.layer_slots) == (2 << 30, 3)


def test_an_error_tells_where_the_value_came_from(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("ram: 8GiB\ngpu: much\n")
    with pytest.raises(ConfigError) as caught:
        EngineConfig.load(file, {"model": "m", "ram": "lots", "dtype": "x"}, source="the command line")
    problems = str(caught.value).split("; ")
    assert any(text.startswith("ram='lots'") and f"over '8GiB' in {file}" in text for text in problems)
    assert any(text.startswith("gpu='much'") and text.endswith(f"(in {file})") for text in problems)
    assert any(text.startswith("dtype='x'") and text.endswith("(from the command line)") for text in problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ram: 1\nram: 2\n", "line 2 is not good YAML: ram is given twice"),
        ("ram: [\n", "is not good YAML"),
        ("- ram\n", "has no keys at its top"),
        ("1: 2\n", "has no keys at its top"),
        ("ram: !!python/object:os.system x\n", "is not good YAML"),
        ("a: \x07", "is not good YAML"),
        ("ramm: 1\n", "did you mean ram"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        EngineConfig.load(file, {"model": "m"})
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        EngineConfig.load(tmp_path / "none.yaml", {"model": "m"})


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert EngineConfig.load(tmp_path / "c.yaml", {"model": "m"}) == EngineConfig(model="m")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_examples_load(path: Path) -> None:
    assert EngineConfig.load(path, {"model": "m"}).model == "m"


def test_there_are_four_examples_and_one_names_every_key() -> None:
    assert {path.stem for path in CONFIGS} >= {"default", "cpu-small", "gpu-16gb", "numa-server"}
    default = next(path for path in CONFIGS if path.stem == "default")
    assert [key for key in EngineConfig.model_fields if f"{key}:" not in default.read_text()] == []
    assert EngineConfig.load(default, {"model": "m"}) == EngineConfig(model="m")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("layer_slots=4", "layer_slots", 4),
        ("attention-cpus=[[0, 1], [2]]", "attention_cpus", [[0, 1], [2]]),
        ("stage_weights=true", "stage_weights", True),
        ("ram=8GiB", "ram", "8GiB"),
        ("model=123", "model", "123"),
        ("trace=a=b", "trace", "a=b"),
    ],
)
def test_settings(text: str, key: str, value: object) -> None:
    assert parse_setting(text) == (key, value)


@pytest.mark.parametrize(
    ("text", "message"), [("ram", "write key=value"), ("rams=1", "did you mean ram"), ("ram=[", "not allowed")]
)
def test_what_is_no_setting(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_setting(text)


def test_the_reference_page_is_what_the_definitions_say() -> None:
    page = Path(__file__).parents[3] / "docs" / "configuration.md"
    assert page.read_text(encoding="utf-8") == reference()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attention_cpus": [[0], [1]]}, "attention_cpus would bind the workers of all of engines=2 to the same CPUs"),
        ({"loader_cpus": "0-1"}, "loader_cpus would bind"),
        ({"device": "cuda:1"}, "device=cuda:1 is one GPU for engines=2: give cuda"),
    ],
)
def test_what_is_one_engines_alone(values: dict[str, Any], message: str) -> None:
    EngineConfig(model="m", **values)
    with pytest.raises(ConfigError, match=message):
        EngineConfig(model="m", engines=2, **values)

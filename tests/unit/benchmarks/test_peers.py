"""Shapes, formats and systems of `python -m benchmarks.peers`."""

from __future__ import annotations

import dataclasses
import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from benchmarks.peers import models, room
from benchmarks.peers.environments import REQUIREMENTS
from benchmarks.peers.shapes import ARCHITECTURES, SHAPES, Shape, published, write_checkpoint
from benchmarks.peers.systems import SYSTEMS
from benchmarks.peers.workloads import WORKLOADS

Usage = namedtuple("Usage", "total used free")


def small(name: str) -> Shape:
    """A tiny shape with fewer of everything."""
    shape = SHAPES[name]
    few = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2}
    few |= {"bos_token_id": 1, "eos_token_id": 2}
    return dataclasses.replace(shape, config={**shape.config, **few})


def test_experts_are_published_one_by_one() -> None:
    names = dict(published("model.layers.0.mlp.experts.gate_up_proj", (2, 6, 4)))
    assert names == {
        f"model.layers.0.mlp.experts.{expert}.{half}_proj.weight": (3, 4)
        for expert in (0, 1)
        for half in ("gate", "up")
    }
    down = dict(published("model.layers.0.mlp.experts.down_proj", (2, 4, 3)))
    assert down == {f"model.layers.0.mlp.experts.{expert}.down_proj.weight": (4, 3) for expert in (0, 1)}
    assert dict(published("model.layers.0.mlp.gate.weight", (2, 4))) == {"model.layers.0.mlp.gate.weight": (2, 4)}


@pytest.mark.parametrize("name", ["tiny-olmoe", "tiny-qwen3-moe"])
def test_a_checkpoint_with_experts_is_read_whole_by_transformers(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    write_checkpoint(small(name), folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in index["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(folder).values())
    model, told = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    single = tensors_of(folder)["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj[3], single)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize(("name", "billions"), [("olmoe", 6.92), ("qwen3-30b-12", 8.10), ("opt-1.3b", 1.32)])
def test_shapes_have_the_parameters_of_what_they_are_named_after(name: str, billions: float) -> None:
    from transformers import AutoConfig

    shape = SHAPES[name]
    with torch.device("meta"):
        config = AutoConfig.for_model(shape.model_type, **shape.config)
        config.tie_word_embeddings = shape.model_type == "opt"
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.02)


def test_what_the_disk_has_no_room_for_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: Usage(0, 0, 5 << 30))
    room.require_room(tmp_path, 2 << 30)
    with pytest.raises(RuntimeError, match=r"needs 4.3 GB of disk and some to spare, 5.4 GB are free"):
        room.require_room(tmp_path, 4 << 30)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"12345")
    assert room.size_of(tmp_path) == room.size_of(tmp_path / "a" / "b") == 5


def test_a_form_is_made_from_its_source_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    def run(command: list[str]) -> str:
        made.append([command[0], command[2].rpartition(".")[2], *command[5:]])
        Path(command[4]).write_bytes(b"")
        return ""

    monkeypatch.setattr(models, "run_command", lambda command: run(command))
    monkeypatch.setattr(models, "python_of", lambda name, cache: Path(f"python of {name}"))
    for _ in range(2):
        assert models.model_path("tiny-olmoe", "gguf-q4_0", tmp_path).name == "tiny-olmoe.gguf-q4_0"
    assert made[1:] == [
        ["python of llama-cpp", "convert_llama_cpp"],
        ["python of llama-cpp", "quantise_llama_cpp", "q4_0"],
    ]
    assert made[0][1] == "shapes"


def test_a_conversion_that_failed_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[Any] = []

    def run(command: list[str]) -> str:
        tries.append(command)
        raise RuntimeError("no such architecture")

    monkeypatch.setattr(models, "run_command", run)
    monkeypatch.setattr(models, "_failures", {})
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"making tiny-opt.checkpoint failed: no such architecture"):
            models.model_path("tiny-opt", "checkpoint", tmp_path)
    assert len(tries) == 1


def test_systems_name_environments_formats_and_families_that_exist() -> None:
    for system in SYSTEMS.values():
        assert system.environment == "" or system.environment in REQUIREMENTS
        assert system.model_format == "checkpoint" or system.model_format in models.FORMATS
        assert set(system.families) <= set(ARCHITECTURES)
    for form in models.FORMATS.values():
        assert form.environment == "" or form.environment in REQUIREMENTS
        assert form.source == "checkpoint" or form.source in models.FORMATS


def test_ours_in_fewer_bits_differs_from_ours_in_those_keys_alone() -> None:
    workload, shape = WORKLOADS["D"], SHAPES["olmoe"]
    for name, model_format, keys in (
        ("ours-int8", "ours-int8", {}),
        ("ours-w8a8", "ours-int8", {"activations": "int8"}),
        ("ours-int4", "ours-int4", {}),
        ("ours-w4a8", "ours-int4", {"activations": "int8"}),
    ):
        plain = SYSTEMS["ours"].options(workload, shape)
        assert SYSTEMS[name].options(workload, shape) == [{**options, **keys} for options in plain]
        assert SYSTEMS[name].model_format == model_format


def test_systems_refuse_families_that_they_do_not_serve() -> None:
    workload = WORKLOADS["A"]
    assert SYSTEMS["ctranslate2"].refusal(workload, SHAPES["olmoe"]) == "does not serve olmoe"
    assert SYSTEMS["llama-cpp-q4_0"].refusal(workload, SHAPES["opt-1.3b"]) == "does not serve opt"
    assert SYSTEMS["llama-cpp"].refusal(workload, SHAPES["qwen3-30b-12"]) is None

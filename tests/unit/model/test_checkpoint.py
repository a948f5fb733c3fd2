"""Opening model directories: what is accepted, and what each broken one is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite.model.checkpoint import CheckpointError, open_checkpoint

SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "BOOL": 1, "C64": 8}
Tensors = dict[str, tuple[str, list[int]]]


def header_of(tensors: Tensors) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header


def write(path: Path, header: Any, data: int | None = None) -> None:
    """A safetensors file with `header` and `data` bytes after it (as many as the header needs by default)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if data is None:
        data = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def write_shards(model: Path) -> dict[str, str]:
    weight_map = {}
    for index in range(3):
        name = f"model-0000{index + 1}-of-00003.safetensors"
        write(
            model / name,
            header_of({f"layer.{index}.weight": ("F16", [4, 3]), f"layer.{index}.bias": ("F16", [4])}),
        )
        weight_map |= {f"layer.{index}.weight": name, f"layer.{index}.bias": name}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_single_file(model: Path) -> None:
    write(
        model / "model.safetensors",
        header_of({"a": ("BF16", [2, 3]), "b": ("I64", []), "c": ("F32", [0, 4])}),
    )
    checkpoint = open_checkpoint(model)
    base = 8 + int.from_bytes((model / "model.safetensors").read_bytes()[:8], "little")
    assert checkpoint.files == (str(model / "model.safetensors"),)
    a, b, c = (checkpoint.tensors[name] for name in "abc")
    assert (a.offset, a.num_bytes, a.dtype, a.shape) == (base, 12, "bfloat16", (2, 3))
    assert (b.offset, b.num_bytes, b.dtype, b.shape) == (base + 12, 8, "int64", ())
    assert (c.num_bytes, c.shape) == (0, (0, 4))


def test_shards(model: Path) -> None:
    weight_map = write_shards(model)
    checkpoint = open_checkpoint(model)
    assert {name: Path(checkpoint.files[t.file]).name for name, t in checkpoint.tensors.items()} == weight_map


def test_tensor_in_two_shards_counts_where_the_index_says(model: Path) -> None:
    weight_map = write_shards(model)
    twice: Tensors = {
        "layer.2.weight": ("F16", [4, 3]),
        "layer.2.bias": ("F16", [4]),
        "layer.0.bias": ("F16", [4]),
    }
    write(model / weight_map["layer.2.bias"], header_of(twice))
    checkpoint = open_checkpoint(model)
    assert Path(checkpoint.files[checkpoint.tensors["layer.0.bias"].file]).name == weight_map["layer.0.bias"]
    weight_map["layer.0.bias"] = weight_map["layer.2.bias"]
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(model)
    assert Path(checkpoint.files[checkpoint.tensors["layer.0.bias"].file]).name == weight_map["layer.2.bias"]


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "not a directory")


def test_no_config(tmp_path: Path) -> None:
    write(tmp_path / "model.safetensors", header_of({"a": ("F32", [1])}))
    refused(tmp_path, "no config.json")


def test_no_weights(model: Path) -> None:
    refused(model, "holds no model.safetensors", "--load-format dummy")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("pytorch_model.bin", ("pickle", "save_pretrained")),
        ("pytorch_model-00001-of-00002.bin", ("pickle", "save_pretrained")),
        ("adapter_model.safetensors", ("adapter", "merge")),
        ("tf_model.h5", ("TensorFlow",)),
        ("model-00001-of-00002.safetensors", ("index.json", "download")),
    ],
)
def test_other_formats(model: Path, file: str, words: tuple[str, ...]) -> None:
    (model / file).write_bytes(b"x")
    refused(model, file, *words)


@pytest.mark.parametrize("config", [{}, {"text_config": {}}])
def test_quantised(model: Path, config: dict[str, Any]) -> None:
    write(model / "model.safetensors", header_of({"a": ("F32", [1])}))
    (config.get("text_config", config))["quantization_config"] = {"quant_method": "hqq"}
    (model / "config.json").write_text(json.dumps(config))
    refused(model, "quantised (hqq)", "dequantise")


def test_unsupported_dtype(model: Path) -> None:
    write(model / "model.safetensors", header_of({"q.weight": ("C64", [4])}))
    refused(model, "model.safetensors", "q.weight", "C64")


def test_missing_shard(model: Path) -> None:
    weight_map = write_shards(model)
    (model / weight_map["layer.1.bias"]).unlink()
    refused(model, "1 of 3 shards", weight_map["layer.1.bias"])


def test_truncated_shard(model: Path) -> None:
    path = model / write_shards(model)["layer.1.bias"]
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    refused(model, path.name, "cut off", "layer.1.bias", f"byte {size} of {size - 1}")


def test_tensor_of_the_index_missing(model: Path) -> None:
    weight_map = write_shards(model)
    write(model / weight_map["layer.1.bias"], header_of({"layer.1.weight": ("F16", [4, 3])}))
    refused(model, weight_map["layer.1.bias"], "lacks tensor layer.1.bias")


def test_index_leaves_the_directory(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    refused(model, "index.json", "../a.safetensors")


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff\xfe", b'{"weight_map": {}}', b'{"weight_map": 3}'])
def test_broken_index(model: Path, text: bytes) -> None:
    (model / "model.safetensors.index.json").write_bytes(text)
    refused(model, "index.json", "download")


@pytest.mark.parametrize("contents", [b"", b"abc", (1 << 40).to_bytes(8, "little"), b"version https://git-lfs"])
def test_no_header(model: Path, contents: bytes) -> None:
    (model / "model.safetensors").write_bytes(contents)
    refused(model, "model.safetensors", "git lfs pull" if contents.startswith(b"version") else "cut off")


@pytest.mark.parametrize(
    "header", [b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b'{"a": {}, "a": {}}', b"[" * 9999]
)
def test_broken_header(model: Path, header: bytes) -> None:
    write(model / "model.safetensors", header, 64)
    refused(model, "model.safetensors", "download it again")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "needs 8 bytes but has 4"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}, "impossible"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, "impossible"),
        ({"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}, "impossible"),
        ({"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, "impossible"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}, "malformed"),
        ({"dtype": "F32", "shape": [16], "data_offsets": [8, 72]}, "cut off"),
        ({"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}, "malformed"),
    ],
)
def test_impossible_entries(model: Path, entry: dict[str, Any], words: str) -> None:
    write(model / "model.safetensors", {"a.weight": entry}, 64)
    refused(model, "a.weight", words)


def test_overlapping_tensors(model: Path) -> None:
    one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    other = {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}
    write(model / "model.safetensors", {"a": one, "b": other})
    refused(model, "b", "overlaps")

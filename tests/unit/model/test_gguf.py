"""GGUF files: what their headers may say, what each broken one is told, and which tensors they stand for."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexgen_lite.model.checkpoint import check_config, model_source, open_checkpoint
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.formats.gguf import find_gguf
from flexgen_lite.model.formats.gguf_header import read_header
from tests.gguf_file import BF16, F16, F32, GgufFile

WIDTH = 256


def gguf_file(**values: Any) -> GgufFile:
    """Two heads of 128 rows, one of which keys have, in one layer."""
    sizes = {"block_count": 1, "embedding_length": WIDTH, "attention.head_count": 2, "attention.head_count_kv": 1}
    return GgufFile(
        {"general.architecture": "llama", **{f"llama.{key}": size for key, size in sizes.items()}, **values}
    )


def ones(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def layer(kind: str, **values: Any) -> GgufFile:
    file = gguf_file(**values)
    for name, rows in (("attn_q", 256), ("attn_k", 128), ("attn_v", 128)):
        file.add(f"blk.0.{name}.weight", kind, ones(rows, WIDTH))
    file.add("blk.0.attn_norm.weight", F32, ones(WIDTH))
    file.add("token_embd.weight", "Q8_0", ones(16, WIDTH))
    return file


def test_header(tmp_path: Path) -> None:
    values = {"a": 3, "b": 0.5, "c": True, "d": "text", "e": ["x", "", "é"], "f": [1, 2], "g": [0.5, 1.0]}
    file = GgufFile({"general.architecture": "llama", "general.alignment": 64, **values}, alignment=64)
    file.add("one", "Q4_0", ones(3, 64))
    file.add("two", F16, ones(2, 5, 4))
    header = read_header(file.write(tmp_path / "m.gguf"))
    assert values.items() <= header.values.items()
    one, two = header.tensors
    assert (one.name, one.shape, one.type.name, one.num_bytes) == ("one", (3, 64), "Q4_0", 3 * 2 * 18)
    assert (two.name, two.shape, two.num_bytes) == ("two", (2, 5, 4), 80)
    assert one.offset % 64 == 0 and two.offset == one.offset + 128


def test_tensors_have_the_names_of_transformers(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(layer("Q4_K").write(tmp_path / "m.gguf"))
    prefix = "model.layers.0"
    names = {f"{prefix}.self_attn.{name}_proj.weight" for name in "qkv"} | {"model.embed_tokens.weight"}
    assert checkpoint.tensors.keys() == names | {f"{prefix}.input_layernorm.weight"}
    pairs = {name: tensor.paired_rows for name, tensor in checkpoint.tensors.items() if tensor.paired_rows}
    assert pairs == {f"{prefix}.self_attn.{name}_proj.weight": 128 for name in "qk"}
    bits = checkpoint.tensors[f"{prefix}.self_attn.q_proj.weight"].bits
    assert bits is not None and (bits.kind, bits.num_bits, bits.group, bits.zeros) == ("uint", 4, 32, "scaled")
    assert len(checkpoint.in_few_bits) == 4 and check_config(tmp_path / "m.gguf").format == ""


def test_only_llamas_rows_are_paired_and_only_gemmas_norms_shifted(tmp_path: Path) -> None:
    for architecture, norm in (("qwen2", None), ("gemma3", -1.0)):
        file = gguf_file()
        file.values["general.architecture"] = architecture
        file.add("blk.0.attn_q.weight", BF16, ones(256, WIDTH))
        file.add("output_norm.weight", F32, ones(WIDTH))
        tensors = open_checkpoint(file.write(tmp_path / "m.gguf")).tensors
        assert not any(tensor.paired_rows for tensor in tensors.values())
        bits = tensors["model.norm.weight"].bits
        assert norm == (bits if bits is None else bits.parts[0][0].number)


def test_experts_are_tensors_of_their_own(tmp_path: Path) -> None:
    file = gguf_file(**{"llama.expert_count": 3})
    file.add("blk.0.ffn_gate_exps.weight", "Q4_0", ones(3, 32, WIDTH))
    tensors = open_checkpoint(file.write(tmp_path / "m.gguf")).tensors
    names = [f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight" for expert in range(3)]
    assert list(tensors) == names
    first, second = tensors[names[0]], tensors[names[1]]
    assert first.shape == (32, WIDTH) and second.offset - first.offset == first.num_bytes == 32 * WIDTH // 32 * 18


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert all(word in message for word in (path.name, *words)), message
    assert "\n" not in message and len(message) < 600


def header_with(start: bytes = b"", **counts: int) -> Callable[[GgufFile], bytes]:
    return lambda file: file.data(**({"start": start} if start else {}), **counts)


BROKEN: dict[str, tuple[Callable[[GgufFile], bytes], str]] = {
    "empty": (lambda file: b"", "does not begin"),
    "magic": (header_with(b"GGML" + struct.pack("<I", 3)), "does not begin"),
    "lfs": (lambda file: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "big-endian": (header_with(b"GGUF" + struct.pack(">I", 3)), "big-endian"),
    "version": (header_with(b"GGUF" + struct.pack("<I", 1)), "version 1"),
    "short": (lambda file: file.data()[:20], "cut off"),
    "in the header": (lambda file: file.data()[:100], "cut off"),
    "in the data": (lambda file: file.data()[:-64], "cut off"),
    "many tensors": (header_with(tensors=1 << 63), str(1 << 63)),
    "many values": (header_with(values=1 << 63), str(1 << 63)),
    "too many values": (header_with(values=100), ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str, tmp_path: Path) -> None:
    damage, words = BROKEN[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(damage(layer("Q4_K")))
    refused(path, words)


def changed(name: str, kind: int | None = None, shape: tuple[int, ...] | None = None) -> Callable[[GgufFile], None]:
    def change(file: GgufFile) -> None:
        old_kind, old_shape, data = file.tensors[name]
        file.tensors[name] = (old_kind if kind is None else kind, shape or old_shape, data)

    return change


def place(name: str, at: int) -> Callable[[GgufFile], None]:
    return lambda file: file.places.update({name: at})


Q, NORM = "blk.0.attn_q.weight", "blk.0.attn_norm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed(Q, kind=10), (Q, "Q2_K", "Q4_K", "get a file")),
        (changed(Q, kind=23), (Q, "IQ4_XS", "only")),
        (changed(Q, kind=39), (Q, "MXFP4")),
        (changed(Q, kind=999), (Q, "type 999")),
        (changed(Q, shape=(256, 128)), (Q, "rows of 128 items", "blocks of 256")),
        (changed(Q, shape=(1 << 62, 256)), (Q, "impossible shape")),
        (changed(Q, shape=(0, 256)), (Q, "impossible shape")),
        (changed(Q, shape=(1, 1, 1, 1, 256)), (Q, "5 dimensions")),
        (changed(Q, shape=(255, 256)), (Q, "2 heads")),
        (place(NORM, 0), (NORM, "overlaps")),
        (place(NORM, 8), (NORM, "no multiple of 32")),
        (place(NORM, 1 << 40), (NORM, "ends at byte")),
        (place(NORM, (1 << 64) - 32), (NORM, "begins at")),
        (lambda file: file.values.update({"general.alignment": 3}), ("general.alignment is 3",)),
        (lambda file: file.values.update({b"bad": b"\xff\xfe"}), ("bad", "not UTF-8")),
        (lambda file: file.values.update({b"\xff": 1}), ("not UTF-8",)),
        (lambda file: file.values.update({b"general.architecture": "x"}), ("general.architecture twice",)),
        (lambda file: file.values.update({"general.architecture": "rwkv7"}), ("rwkv7", "qwen3moe", "safetensors")),
        (lambda file: file.values.update({"split.count": 3}), ("one of 3 files",)),
    ],
)  # fmt: skip
def test_what_headers_may_not_say(change: Callable[[GgufFile], None], words: tuple[str, ...], tmp_path: Path) -> None:
    file = layer("Q4_K")
    change(file)
    refused(file.write(tmp_path / "m.gguf"), *words)


def test_the_same_name_twice(tmp_path: Path) -> None:
    data = layer("Q4_K").data().replace(b"blk.0.attn_k.weight", b"blk.0.attn_v.weight")
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", "blk.0.attn_v.weight twice")


def test_every_beginning_of_a_file_is_refused(tmp_path: Path) -> None:
    data = layer("Q4_0").data()
    path = tmp_path / "m.gguf"
    for length in (*range(0, 700, 7), len(data) // 2, len(data) - 64):
        path.write_bytes(data[:length])
        refused(path)


def write_split(directory: Path, count: int = 2) -> list[Path]:
    paths = [directory / f"m-{number + 1:05}-of-{count:05}.gguf" for number in range(count)]
    file = layer("Q4_K", **{"split.count": count, "split.tensors.count": 5})
    for number, path in enumerate(paths):
        values = file.values if not number else {"split.no": number, "split.count": count}
        tensors = dict(list(file.tensors.items())[number::count])
        GgufFile(values, tensors).write(path)
    return paths


def test_a_model_of_several_files(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    for path in paths:
        checkpoint = open_checkpoint(path)
        assert checkpoint.files == tuple(map(str, paths)) and len(checkpoint.tensors) == 5
    assert model_source(tmp_path) == paths[0]
    paths[0].rename(tmp_path / "away")
    refused(paths[1], "1 of its 2 files are missing", paths[0].name)


def test_tensors_of_several_files(tmp_path: Path) -> None:
    first, second = write_split(tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match="in two of its 2 files"):
        open_checkpoint(first)
    GgufFile({}).write(second)
    with pytest.raises(CheckpointError, match="hold 3 of 5 tensors"):
        open_checkpoint(first)


def test_directories(tmp_path: Path) -> None:
    """One model is found, also beside other files; of several one must be given; safetensors come first."""
    assert find_gguf(tmp_path) is None and model_source(tmp_path) == tmp_path
    only = layer("Q4_0").write(tmp_path / "a.gguf")
    for name in ("mmproj-a.gguf", "a-mmproj-f16.gguf", "imatrix_x.gguf"):
        (tmp_path / name).touch()
    assert model_source(tmp_path) == only
    layer("Q8_0").write(tmp_path / "b.gguf")
    with pytest.raises(CheckpointError, match=r"holds 2 models as GGUF \(a.gguf, b.gguf\): give one of them"):
        model_source(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert model_source(tmp_path) == tmp_path

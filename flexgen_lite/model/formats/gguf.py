"""Models as GGUF: their files, and their tensors as Transformers names them and has their rows.

Weights in blocks are put as stored_tensor.py has them, to be kept in few bits or to be unpacked while they are loaded.
llama.cpp's converter changes some tensors, which is undone here: rows of q and k that it orders by pairs for its rotary
embedding (architecture llama), and 1 that it adds to Gemma's norms. Source: llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexgen_lite.model.files import CheckpointError, is_there
from flexgen_lite.model.formats.gguf_header import GgufHeader, GgufTensor, is_gguf, read_header
from flexgen_lite.model.formats.gguf_names import ARCHITECTURES, EXPERTS, Architecture
from flexgen_lite.model.spec import StoredPart
from flexgen_lite.model.stored_tensor import StoredBits, StoredTensor
from flexgen_lite.text.shown import shown, shown_names, shown_path, shown_text

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_BESIDE = re.compile("mmproj|imatrix", re.IGNORECASE)  # names of files that are no language models
_EXPERT = re.compile(r"(ffn_(?:gate|up|down))\.(\d+)")  # of files from before 2024-04
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ADDED = "added"
"""The layout of floats that have a number added to them."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """How a type is kept in memory, see packing.py."""

    kind: str
    num_bits: int
    group: int
    scale_dtype: str
    zeros: str = ""
    factor_group: int = 0  # 0: there are none


_KEPT = {
    "Q4_0": _Kept("int", 4, 32, "float16"),
    "Q4_1": _Kept("uint", 4, 32, "float16", "float32"),
    "Q5_0": _Kept("int", 8, 32, "float16"),
    "Q5_1": _Kept("int", 8, 32, "float16", "float32"),
    "Q8_0": _Kept("int", 8, 32, "float16"),
    "Q4_K": _Kept("uint", 4, 32, "uint8", "scaled", 256),
    "Q5_K": _Kept("int", 8, 32, "uint8", "scaled", 256),
    "Q6_K": _Kept("int", 8, 16, "int8", "", 256),
}


@dataclass(frozen=True, slots=True)
class GgufModel:
    """All files of a model."""

    headers: tuple[GgufHeader, ...]

    @property
    def values(self) -> Mapping[str, Any]:
        return self.headers[0].values

    @property
    def name(self) -> str:
        """Of its architecture."""
        return str(self.values.get("general.architecture"))

    @property
    def architecture(self) -> Architecture:
        """Raises CheckpointError where it is none that is read."""
        found = ARCHITECTURES.get(self.name)
        if found is None:
            raise self.error(
                f"its architecture {shown_text(self.name)} is not read, only {', '.join(ARCHITECTURES)} are: get the "
                "model's safetensors repository instead"
            )
        return found

    def value(self, key: str, default: Any = None) -> Any:
        """Of the architecture's own values."""
        found = self.values.get(f"{self.name}.{key}", default)
        is_same = isinstance(found, list) and found and all(item == found[0] for item in found)
        return found[0] if is_same else found  # what is the same in all layers

    def tensors(self) -> Iterator[tuple[int, GgufTensor]]:
        """With the numbers of their files."""
        for file, header in enumerate(self.headers):
            for tensor in header.tensors:
                yield file, tensor

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{shown_path(self.headers[0].path)}: {message}")


def find_gguf(directory: Path) -> Path | None:
    """The one model in GGUF that a directory holds, its first file; None: there is none.

    Raises:
        CheckpointError: there are several.
    """
    found = sorted(path for path in directory.glob("*") if is_gguf(path) and not _BESIDE.search(path.name))
    models = {_SPLIT.sub(r"\1", path.name): path for path in reversed(found)}
    if len(models) > 1:
        names = shown_names(path.name for path in sorted(models.values()))
        raise CheckpointError(f"{shown_path(directory)} holds {len(models)} models as GGUF ({names}): give one of them")
    return next(iter(models.values()), None)


def all_parts(name: str) -> str:
    """A pattern for the names of all files of the model that one of them names."""
    split = _SPLIT.fullmatch(name)
    return name if split is None else f"{split[1]}-*-of-{split[3]}.gguf"


def open_gguf(path: Path) -> GgufModel:
    """The model that a file holds, or is a part of. Raises CheckpointError."""
    split = _SPLIT.fullmatch(path.name)
    if split is None:
        header = read_header(path)
        if (count := header.values.get("split.count", 1)) not in (0, 1):
            raise CheckpointError(
                f"{shown_path(path)}: it is one of {shown(count)} files, and not named like them "
                f"({path.stem}-00001-of-0000N.gguf): give it its name again"
            )
        return GgufModel((header,))
    stem, _, count = split.groups()
    paths = [path.with_name(f"{stem}-{number:05}-of-{count}{path.suffix}") for number in range(1, int(count) + 1)]
    missing = [part.name for part in paths if not is_there(part)]
    if missing or not paths:
        raise CheckpointError(
            f"{shown_path(path)}: {len(missing)} of its {int(count)} files are missing ({shown_names(missing)}): "
            "download them"
        )
    model = GgufModel(tuple(read_header(part) for part in paths))
    names = [tensor.name for _, tensor in model.tensors()]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise model.error(f"tensor {shown_text(twice)} is in two of its {len(paths)} files: download them again")
    told = model.values.get("split.tensors.count", len(names))
    if told != len(names):
        raise model.error(f"its files hold {len(names)} of {shown(told)} tensors: download them again")
    return model


def stored_tensors(model: GgufModel) -> dict[str, StoredTensor]:
    """All tensors by Transformers' names, experts one by one. Raises CheckpointError."""
    found: dict[str, StoredTensor] = {}
    for file, tensor in model.tensors():
        if tensor.name.split(".")[0] in ("rope_freqs", "rope_factors_long", "rope_factors_short"):
            continue  # a part of the config
        for stored in _stored(model, file, tensor):
            found[stored.name] = stored
    return found


def _stored(model: GgufModel, file: int, tensor: GgufTensor) -> Iterator[StoredTensor]:
    architecture, block = model.architecture, _BLOCK.fullmatch(tensor.name)
    if block is None:
        place, dot, suffix = tensor.name.rpartition(".")
        yield _one(model, file, tensor, f"{architecture.outside.get(place, place)}{dot}{suffix}")
        return
    layer, place, suffix = block.groups()
    names, prefix = architecture.names(model.value("expert_count", 0)), f"model.layers.{layer}."
    if (single := _EXPERT.fullmatch(place)) is not None:
        name = names.get(f"{single[1]}_exps", place).format(single[2])
        yield _one(model, file, tensor, f"{prefix}{name}.{suffix}", place)
        return
    name = names.get(place, place)
    if place not in EXPERTS:
        yield _one(model, file, tensor, f"{prefix}{name}.{suffix}", place)
        return
    if len(tensor.shape) != 3:
        raise model.error(f"tensor {shown_text(tensor.name)} has shape {list(tensor.shape)}, three sizes expected")
    count, size = tensor.shape[0], tensor.num_bytes // tensor.shape[0]
    for expert in range(count):
        one = replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + expert * size, num_bytes=size)
        yield _one(model, file, one, f"{prefix}{name.format(expert)}.{suffix}")


def _one(model: GgufModel, file: int, tensor: GgufTensor, name: str, place: str = "") -> StoredTensor:
    kind, architecture = tensor.type, model.architecture
    shape = (1, *tensor.shape) if place == "ffn_gate_inp_shexp" and len(tensor.shape) == 1 else tensor.shape
    pairs = _paired_rows(model, tensor, place) if architecture.pairs_rows and place in ("attn_q", "attn_k") else 0
    floats = _FLOATS.get(kind.name)
    source = StoredTensor(name, file, tensor.offset, tensor.num_bytes, floats or "uint8", shape, None, (), False, pairs)
    if floats is not None:
        if not architecture.norm_shift or not name.endswith("norm.weight"):
            return source
        part = StoredPart("all", ADDED, number=-architecture.norm_shift)
        return replace(source, bits=StoredBits("", 0, 0, floats, "", ((part, source),)))
    kept = _KEPT[kind.name]
    part = StoredPart("all", kind.name.lower(), kept.num_bits, (1, kind.items))
    bits = StoredBits(
        kept.kind, kept.num_bits, kept.group, kept.scale_dtype, kept.zeros, ((part, source),),
        factors="float16" if kept.factor_group else "", factor_group=kept.factor_group,
    )  # fmt: skip
    return replace(source, bits=bits, dtype="bfloat16")


def _paired_rows(model: GgufModel, tensor: GgufTensor, place: str) -> int:
    """Of a head."""
    heads = model.value("attention.head_count" if place == "attn_q" else "attention.head_count_kv")
    heads = model.value("attention.head_count") if heads is None else heads
    if type(heads) is not int or heads <= 0 or tensor.shape[0] % (2 * heads):
        raise model.error(f"tensor {shown_text(tensor.name)} of {tensor.shape[0]} rows has not {shown(heads)} heads")
    return tensor.shape[0] // heads

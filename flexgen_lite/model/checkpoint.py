"""A Hugging Face model directory, or a model as GGUF: which tensor lies in which file, at which bytes.

Only headers are read, by the compute worker; the weights are read by the disk loader (workers/loader/). Offsets and
shapes are checked against the files, so that what comes after can trust them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from flexgen_lite.model.files import CheckpointError, is_there, open_file, parse_object, read, read_json
from flexgen_lite.model.formats.gguf import find_gguf, open_gguf, stored_tensors
from flexgen_lite.model.formats.gguf_header import is_gguf
from flexgen_lite.model.formats.joined import join_layers
from flexgen_lite.model.formats.section import Section, read_section
from flexgen_lite.model.spec import ITEM_BYTES, FileStamp, SmallSource
from flexgen_lite.model.stored_tensor import StoredBits, StoredTensor
from flexgen_lite.text.shown import shown, shown_names, shown_path, shown_text

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
MAX_INT = (1 << 63) - 1

_DTYPES = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_SAVE_AGAIN = "load it with Transformers and save_pretrained it into a new directory"
_OTHER_FORMATS = (
    ("pytorch_model*.bin", "PyTorch pickle files", f"to convert it, {_SAVE_AGAIN}"),
    (
        "adapter_model.safetensors",
        "a PEFT adapter",
        "merge it into its base model (merge_and_unload) and save that",
    ),
    ("tf_model*.h5", "TensorFlow weights", "get the model's safetensors repository instead"),
    ("flax_model*.msgpack", "Flax weights", "get the model's safetensors repository instead"),
    ("consolidated*.pth", "original PyTorch weights", "get the repository converted for Transformers"),
    ("consolidated*.safetensors", "consolidated weights", "get the repository converted for Transformers"),
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """
    Attributes:
        tensors: weights that are stored in few bits are there under the names that they would have without.
        section: what the files beside it say of these.
        metadata: of the files' headers.
    """

    files: tuple[str, ...]
    stamps: tuple[FileStamp, ...]  # of the files, taken before their headers were read
    tensors: dict[str, StoredTensor]
    section: Section = field(default_factory=Section)
    metadata: tuple[Mapping[str, str], ...] = ()

    @property
    def misfit(self) -> str:
        """Where its tensors are not those that the model has."""
        if is_gguf(Path(self.files[0])):
            return (
                "the file does not say its model's sizes right, or is of an early version of its architecture: get a "
                "newer file, or the model's safetensors repository"
            )
        return "config.json does not belong to these weights: download both again"

    @property
    def in_few_bits(self) -> tuple[StoredBits, ...]:
        """How the weights are stored that are."""
        tensors = (one for tensor in self.tensors.values() for one in (tensor, *tensor.members))
        return tuple(tensor.bits for tensor in tensors if tensor.bits is not None and tensor.bits.kind)


def model_source(directory: Path) -> Path:
    """What a model is opened from: a directory, or the one GGUF file that it holds. Raises CheckpointError."""
    if any(is_there(directory / name) for name in (WEIGHTS_NAME, INDEX_NAME)):
        return directory
    return find_gguf(directory) or directory


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Read the headers of the model in `directory`, or of that as GGUF. Raises CheckpointError."""
    directory = Path(directory).absolute()
    if is_gguf(directory):
        model = open_gguf(directory)
        files, stamps = zip(*((str(header.path), header.stamp) for header in model.headers), strict=True)
        return Checkpoint(files, stamps, stored_tensors(model))
    section = check_config(directory)
    found = _open_files(directory)

    def read_small(source: SmallSource) -> bytes:
        path = Path(found.files[source.file])
        with open_file(path) as stream:
            stream.seek(source.offset)
            return read(stream, path, source.num_bytes)

    tensors = join_layers(found.tensors, section, found.files, found.metadata, read_small)
    return replace(found, tensors=tensors, section=section)


def _open_files(directory: Path) -> Checkpoint:
    # Transformers prefers the single file too, where both are there.
    if is_there(directory / WEIGHTS_NAME):
        return _collect((directory / WEIGHTS_NAME,), {})
    if is_there(directory / INDEX_NAME):
        return _open_shards(directory)
    raise CheckpointError(_no_safetensors(directory))


def check_config(directory: Path) -> Section:
    """Whether there is a config.json, and what is said of how its checkpoint is quantised. Raises CheckpointError."""
    if is_gguf(directory):
        return Section()
    if not directory.is_dir():
        raise CheckpointError(
            f"{shown_path(directory)} is not a directory: give the directory that holds the model's config.json"
        )
    path = directory / "config.json"
    if not is_there(path):
        raise CheckpointError(f"{directory} has no config.json: it is not a Hugging Face model directory")
    return read_section(directory, read_json(path))


def _no_safetensors(directory: Path) -> str:
    for pattern, what, remedy in _OTHER_FORMATS:
        found = sorted(path.name for path in directory.glob(pattern))
        if found:
            return f"{directory} holds {what} ({found[0]}), only {WEIGHTS_NAME} or its shards are read: {remedy}"
    shards = sorted(directory.glob("*.safetensors"))
    if shards:
        return f"{directory} holds {shards[0].name} but no {INDEX_NAME}: download that too"
    return f"{directory} holds no {WEIGHTS_NAME} and no {INDEX_NAME}: download them, or use --load-format dummy"


def _open_shards(directory: Path) -> Checkpoint:
    index_path = directory / INDEX_NAME
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path} has no weight_map: download the index again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_path}: tensor {shown_text(name)} is in {shown(shard)}, which is no safetensors file beside "
                "it: download the index again"
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not is_there(directory / shard)]
    if missing:
        raise CheckpointError(
            f"{directory}: {len(missing)} of {len(shards)} shards are missing ({shown_names(missing)}): download the "
            "model again to complete it"
        )
    checkpoint = _collect(tuple(directory / shard for shard in shards), weight_map)
    for name, shard in weight_map.items():
        stored = checkpoint.tensors.get(name)
        if stored is None or Path(checkpoint.files[stored.file]).name != shard:
            raise CheckpointError(
                f"{directory / shard} lacks tensor {shown_text(name)}, which {INDEX_NAME} says it has: download both "
                "files again"
            )
    return checkpoint


def _collect(paths: tuple[Path, ...], weight_map: dict[str, str]) -> Checkpoint:
    tensors: dict[str, StoredTensor] = {}
    stamps, metadata = [], []
    for file, path in enumerate(paths):
        with open_file(path) as stream:
            stamps.append(stamp(os.fstat(stream.fileno())))
            header, about = _read_header(path, stream, file, stamps[-1].size)
        metadata.append(about)
        for stored in header:
            other = tensors.get(stored.name)
            if other is None or weight_map.get(stored.name) == path.name:
                tensors[stored.name] = stored
            elif weight_map.get(stored.name) != paths[other.file].name:
                raise CheckpointError(
                    f"tensor {shown_text(stored.name)} is both in {paths[other.file]} and in {path}, and "
                    f"{INDEX_NAME} names neither: "
                    "download the model again"
                )
    files = tuple(str(path) for path in paths)
    return Checkpoint(files, tuple(stamps), tensors, metadata=tuple(metadata))


def stamp(status: os.stat_result) -> FileStamp:
    return FileStamp(status.st_size, status.st_mtime_ns, status.st_ino)


def _read_header(path: Path, stream: BinaryIO, file: int, size: int) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors of one safetensors file, and its metadata: 8 bytes of header length, the JSON header, the data."""
    again = "download it again"
    start = read(stream, path, 8)
    length = int.from_bytes(start, "little")
    if start == b"version ":
        raise CheckpointError(f"{path} is a Git LFS pointer, not the weights: fetch them with git lfs pull")
    if size < 8 or 8 + length > size:
        raise CheckpointError(f"{path} is cut off: {size} bytes do not even hold its header; {again}")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: a header of {length} bytes, {MAX_HEADER_BYTES} allowed; {again}")
    header = parse_object(path, read(stream, path, length))
    base = 8 + length
    tensors = [_stored(path, file, base, name, entry) for name, entry in header.items() if name != "__metadata__"]
    tensors.sort(key=lambda stored: (stored.offset, stored.num_bytes))
    end = base
    for stored in tensors:
        if stored.offset + stored.num_bytes > size:
            raise CheckpointError(
                f"{path} is cut off: tensor {shown_text(stored.name)} ends at byte "
                f"{stored.offset + stored.num_bytes} of {size}; {again}"
            )
        if stored.num_bytes and stored.offset < end:
            raise CheckpointError(f"{path}: tensor {shown_text(stored.name)} overlaps the tensor before it; {again}")
        end = max(end, stored.offset + stored.num_bytes)
    about = header.get("__metadata__")
    return tensors, about if isinstance(about, dict) else {}


def _stored(path: Path, file: int, base: int, name: str, entry: Any) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        integers = [*shape, begin, end]
        supported = dtype in _DTYPES
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"{path}: tensor {shown_text(name)} has a malformed header entry; download it again"
        ) from None
    if not all(type(number) is int and 0 <= number <= MAX_INT for number in integers) or end < begin:
        raise CheckpointError(f"{path}: tensor {shown_text(name)} has impossible offsets or shape; download it again")
    if not supported:
        raise CheckpointError(
            f"{path}: tensor {shown_text(name)} is stored as {shown_text(dtype)}, and only {', '.join(_DTYPES)} are "
            f"supported: use the unquantised model, or {_SAVE_AGAIN}"
        )
    needed = math.prod(shape) * ITEM_BYTES[_DTYPES[dtype]]
    if needed != end - begin:
        raise CheckpointError(
            f"{path}: tensor {shown_text(name)} of shape {shown(shape)} and dtype {dtype} needs {shown(needed)} bytes "
            f"but has {end - begin}; download it again"
        )
    return StoredTensor(name, file, base + begin, end - begin, _DTYPES[dtype], tuple(shape))

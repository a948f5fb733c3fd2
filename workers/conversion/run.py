"""A model directory written anew with its weights in few bits, so that it can be gone on with after any interruption.

Files come whole: each is written under a temporary name, synced and renamed. Each file of weights says in its header
what it was made of; config.json comes last, so that nobody takes an unfinished directory for a model.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from transformers.utils.hub import CHAT_TEMPLATE_DIR

from flexgen_lite.model.checkpoint import INDEX_NAME, stamp
from flexgen_lite.model.files import CheckpointError, read_json
from flexgen_lite.model.quantization import Quantization
from flexgen_lite.text.shown import shown_path
from flexgen_lite.text.sizes import format_size
from flexgen_lite.workers.conversion.shards import Shard, index_of, plan_shards
from flexgen_lite.workers.conversion.source import SourceModel, open_source
from flexgen_lite.workers.conversion.tensors import NewFile, Source, jobs
from flexgen_lite.workers.serve import UserError

BEGUN = "quantize.part.json"
"""In a directory that is not finished: what is being made there."""
PART = ".part"
VERSION = 1  # of what is written; another, where the same source would come to other bytes
MAX_BYTES = 4_000_000_000  # of a file, but for a tensor that is larger
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"}

Told = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Written:
    num_bytes: int  # of the new weights
    source_bytes: int
    num_weights: int  # that are in few bits
    is_old: bool  # all was there already
    warnings: tuple[str, ...]


def quantize(source: Path, target: Path, wanted: Quantization, interval: float, told: Told) -> Written:
    """Write the model in `source` into `target` with weights in few bits.

    Args:
        told: called every `interval` seconds with the bytes of the source that are done, and all of them.

    Raises:
        CheckpointError, UserError: the source or the target cannot be used, and why.
    """
    found = open_source(source, wanted)
    digest = _digest(found, wanted)
    shards = plan_shards(found.items, digest, MAX_BYTES)
    written = Written(
        sum(shard.num_bytes for shard in shards),
        sum(item.source.num_bytes for item in found.items),
        sum(item.packing is not None for item in found.items),
        _is_done(target, shards),
        found.warnings,
    )
    if written.is_old:
        return written
    others = _other_files(found.directory)
    _check_room(target, [shard for shard in shards if not _is_whole(target / shard.name, shard)], others)
    with _full_disk_told(target), _claimed(target, digest, found):
        missing = [shard for shard in shards if not _is_whole(target / shard.name, shard)]
        _write_shards(found, target, missing, written.source_bytes, interval, told)
        _check_unchanged(found)
        for path in others:
            _put(target / path.relative_to(found.directory), path.read_bytes())
        _put(target / INDEX_NAME, _text(index_of(shards)))
        config = read_json(found.directory / "config.json")
        _put(target / "config.json", _text(config | {"quantization_config": found.section}))
        (target / BEGUN).unlink()
    return written


def _digest(source: SourceModel, wanted: Quantization) -> str:
    """Of what the new files are made of."""
    checkpoint = source.checkpoint
    files = [(Path(path).name, s.size, s.mtime_ns) for path, s in zip(checkpoint.files, checkpoint.stamps, strict=True)]
    packed = [(item.source.name, item.packing) for item in source.items]
    config = (source.directory / "config.json").read_bytes()
    return hashlib.blake2b(repr((VERSION, files, packed, wanted.ignore, config)).encode(), digest_size=16).hexdigest()


def _is_done(target: Path, shards: list[Shard]) -> bool:
    done = (target / "config.json").is_file() and not (target / BEGUN).exists()
    return done and all(_is_whole(target / shard.name, shard) for shard in shards)


def _is_whole(path: Path, shard: Shard) -> bool:
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == shard.num_bytes and file.read(len(shard.header)) == shard.header
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def _claimed(target: Path, digest: str, source: SourceModel) -> Iterator[None]:
    """Within, `target` is there, and this process alone writes what `digest` says into it.

    Raises:
        UserError: it has something else, or another process is at it.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{shown_path(target)} is not a directory: give another one")
    if target.is_dir() and os.path.samefile(target, source.directory):
        raise UserError(f"{shown_path(target)} is the model that is to be quantised: give another directory")
    target.mkdir(parents=True, exist_ok=True)
    begun = target / BEGUN
    if not begun.exists() and any(target.iterdir()):
        raise UserError(f"{shown_path(target)} holds something else: give a directory that is empty, or not there yet")
    with begun.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing into {shown_path(target)}: let it finish") from None
        file.seek(0)
        before = _digest_in(file.read())
        if before not in (None, digest):
            raise UserError(
                f"{shown_path(target)} holds the beginning of what was to be made of another model, or with other "
                "settings: give the same again, or another directory, or remove it"
            )
        if before is None:
            file.truncate(0)
            file.write(json.dumps({"made_of": str(source.directory), "digest": digest}))
            file.flush()
            os.fsync(file.fileno())
        for path in target.glob(f"*{PART}"):
            path.unlink()
        yield


def _digest_in(note: str) -> str | None:
    """None where there is no note, or one whose writing was cut off, before which nothing else was written."""
    try:
        digest: str | None = json.loads(note)["digest"]
    except (ValueError, KeyError, TypeError):
        return None
    return digest


@contextlib.contextmanager
def _full_disk_told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{shown_path(target)}: {os.strerror(error.errno)}: make room and give the same command again, it goes on "
            "behind the files that are complete"
        ) from None


def _other_files(directory: Path) -> list[Path]:
    """What a model directory has beside weights and config.json: the tokenizer's files and the like."""
    return [
        path
        for path in sorted([*directory.iterdir(), *(directory / CHAT_TEMPLATE_DIR).glob("*")])
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix not in WEIGHTS
        and not path.name.endswith(".index.json")
        and path.name not in ("config.json", BEGUN)
    ]


def _check_room(target: Path, missing: list[Shard], others: list[Path]) -> None:
    needed = sum(shard.num_bytes for shard in missing) + sum(path.stat().st_size for path in others) + (1 << 20)
    there = next(path for path in (target.absolute(), *target.absolute().parents) if path.is_dir())
    unfinished = sum(512 * path.stat().st_blocks for path in target.glob(f"*{PART}"))
    free = shutil.disk_usage(there).free + unfinished
    if needed > free:
        raise UserError(
            f"{shown_path(target)}: {format_size(needed, math.ceil)} are needed, and its disk has "
            f"{format_size(free, math.floor)}: make room, or give a directory on another disk"
        )


def _write_shards(
    source: SourceModel, target: Path, shards: list[Shard], total: int, interval: float, told: Told
) -> None:
    done = total - sum(item.source.num_bytes for shard in shards for item in shard.items)
    files = Source(source.checkpoint.files)
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="quantize")
    try:
        for shard in shards:
            for num_bytes in _write_shard(shard, files, target, pool, interval):
                told(done + num_bytes, total)
            done += sum(item.source.num_bytes for item in shard.items)
    finally:
        pool.shutdown(cancel_futures=True)
        files.close()


def _write_shard(
    shard: Shard, source: Source, target: Path, pool: ThreadPoolExecutor, interval: float
) -> Iterator[int]:
    """The bytes of the source that are done, every `interval` seconds."""
    for item in shard.items:
        source.open(item.source.file)
    part = target / (shard.name + PART)
    with part.open("wb", buffering=0) as file:
        file.truncate(shard.num_bytes)
        os.pwrite(file.fileno(), shard.header, 0)
        new = NewFile(file.fileno(), shard.offsets)
        left = {pool.submit(job) for item in shard.items for job in jobs(item, source, new)}
        done = 0
        try:
            while left:
                finished, left = concurrent.futures.wait(left, interval, FIRST_EXCEPTION)
                done += sum(future.result() for future in finished)
                yield done
        finally:
            for future in left:
                future.cancel()
            concurrent.futures.wait(left)
        os.fsync(file.fileno())
    _rename(part, target / shard.name)


def _check_unchanged(source: SourceModel) -> None:
    for path, before in zip(source.checkpoint.files, source.checkpoint.stamps, strict=True):
        if stamp(os.stat(path)) != before:
            raise CheckpointError(f"{path} changed while it was read: leave the model's files alone and start again")


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(path.name + PART)
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _rename(part, path)


def _rename(part: Path, path: Path) -> None:
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _text(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

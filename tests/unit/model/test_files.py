"""Whatever lies where a model's file should be: one sentence with its name, and nobody waits for a pipe."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from flexgen_lite.model.checkpoint import CheckpointError, open_checkpoint
from flexgen_lite.model.files import check_contents, check_files, is_there, open_file, read_json

pytestmark = pytest.mark.timeout(30)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(path))


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "directory": (Path.mkdir, "is a directory, not a file: download it again"),
    "pipe": (os.mkfifo, "is a named pipe, not a file"),
    "socket": (bind, "is a socket or a device, not a file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "is a link to nowhere, which is not there"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be opened: Too many levels of symbolic links"),
    "link to a pipe": (
        lambda path: (os.mkfifo(path.parent / "pipe"), path.symlink_to("pipe")),
        "is a named pipe, not a file",
    ),
}


def refused(call: Callable[[], object], path: Path, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(str(path)) and words in message and message.splitlines() == [message]
    assert len(message) < len(str(path)) + 200


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, words = NO_FILES[kind]
    path = tmp_path / "config.json"
    make(path)
    assert is_there(path)
    for read in (open_file, read_json, lambda path: check_files(path.parent, [path.name, "none"])):
        refused(lambda read=read: read(path), path, words)  # type: ignore[misc]
    refused(lambda: check_contents(tmp_path, ["config.json"]), path, words)
    refused(lambda: open_checkpoint(tmp_path), path, words)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"]
)
@pytest.mark.parametrize("kind", NO_FILES)
def test_weights_that_are_no_file(kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    if name.endswith("-of-00001.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{name}"}}}}')
    make, words = NO_FILES[kind]
    make(tmp_path / name)
    refused(lambda: open_checkpoint(tmp_path), tmp_path / name, words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_this_user_may_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    path.chmod(0)
    refused(lambda: read_json(path), path, "cannot be opened: Permission denied: let this user read it")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "its JSON cannot be read (it is empty); download it again"),
        (b"{", "its JSON cannot be read (Expecting property name"),
        (b"[1]", "a JSON object is expected, not list"),
        (b"null", "a JSON object is expected, not NoneType"),
        (b'{"a": 1, "a": 2}', "its JSON cannot be read (the same key twice)"),
        (b"[" * 100_000, "its JSON cannot be read (maximum recursion depth exceeded"),
        (b'{"a": ' + b"9" * 5000 + b"}", "its JSON cannot be read (Exceeds the limit"),
        (b'{"a": "caf\xe9"}', "byte 11 (0xe9) is not UTF-8; download it again"),
        ('{"a": 1}'.encode("utf-16"), "byte 1 (0xff) is not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "its JSON cannot be read ("),
        (b"\xef\xbb\xbf{}", "its JSON cannot be read (Unexpected UTF-8 BOM"),
        (bytes(range(256)), "byte 129 (0x80) is not UTF-8"),
    ],
)
def test_what_is_no_json_object(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    refused(lambda: read_json(path), path, words)
    refused(lambda: check_contents(tmp_path, ["config.json", "none.json"]), path, words)


def test_texts_are_utf8(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes("é".encode())
    check_contents(tmp_path, [path.name])
    path.write_bytes(b"caf\xe9")
    refused(lambda: check_contents(tmp_path, [path.name]), path, "byte 4 (0xe9) is not UTF-8; download it again")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_what_is_no_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        is_there(tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": f"{name}.safetensors"}}))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "download it again" in str(caught.value)


def test_whether_there_is_anything(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert is_there(tmp_path / "file")
    assert not is_there(tmp_path / "none") and not is_there(tmp_path / "file" / "below")

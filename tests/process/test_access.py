"""Who may use an engine: the user alone on this machine, holders of the key over the network."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_lite import Client, ConfigError, EngineError, FlexGenLite, SamplingParams
from flexgen_lite.wire.access import KeyFileError, make_key_file, read_key_file
from tests.tiny_models import make_model

PARAMS = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("key") / "engine.key"
    make_key_file(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("opt", tmp_path_factory.mktemp("opt"))


@pytest.fixture(scope="module")
def engine(model: Path, key: Path) -> Iterator[FlexGenLite]:
    with FlexGenLite(model, endpoint="tcp://127.0.0.1:*", key_file=str(key)) as engine:
        yield engine


def test_who_holds_the_key_comes_in(engine: FlexGenLite, key: Path) -> None:
    assert engine.endpoint.startswith("tcp://127.0.0.1:")
    with Client(engine.endpoint, key_file=key) as client:
        (found,) = client.submit([[5, 6, 7]], PARAMS).results()
        assert list(found.token_ids) == list(engine.generate([5, 6, 7], PARAMS).token_ids)


def test_who_holds_another_key_does_not(engine: FlexGenLite, tmp_path: Path) -> None:
    make_key_file(tmp_path / "other.key")
    with pytest.raises(EngineError, match=r"does not take this key|closed the connection|did not answer"):
        Client(engine.endpoint, key_file=tmp_path / "other.key", connect_timeout=5)
    assert engine.generate([5, 6, 7], PARAMS).error is None


def test_a_client_of_the_right_engine_with_the_wrong_key_is_told(engine: FlexGenLite, key: Path) -> None:
    """It knows the engine's public key, so that only its own can be wrong."""
    keys = read_key_file(key)
    wrong = type(keys)(keys.engine, keys.engine)
    from flexgen_lite.client.connection import Connection

    connection = Connection(engine.endpoint, connect_timeout=5, heartbeat=1, answer_timeout=5, keys=wrong)
    with pytest.raises(EngineError, match="does not take this key"):
        connection.open()


def test_without_a_key_there_is_no_way_in(engine: FlexGenLite) -> None:
    with pytest.raises(EngineError, match="needs the key_file"):
        Client(engine.endpoint)


def test_an_open_port_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"endpoint=tcp://127\.0\.0\.1:5000 needs a key_file.*flexgen-lite keygen"):
        FlexGenLite("m", endpoint="tcp://127.0.0.1:5000")


def test_sockets_are_the_users_own(model: Path) -> None:
    with FlexGenLite(model) as engine:
        path = Path(engine.endpoint.removeprefix("ipc://"))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "k"
    with pytest.raises(KeyFileError, match=r"No such file.*keygen"):
        read_key_file(path)
    make_key_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_key_file(path) == read_key_file(path)
    with pytest.raises(FileExistsError):
        make_key_file(path)
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="can be read by others: chmod 600"):
        read_key_file(path)
    path.chmod(0o600)
    path.write_text("nonsense")
    with pytest.raises(KeyFileError, match="holds no key"):
        read_key_file(path)

"""`flexgen-lite serve`: the OpenAI API over HTTP, in front of an engine of its own or a running one."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexgen_lite.cli.terminal import log, signals_interrupt
from flexgen_lite.client.client import Client
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.errors import EngineError
from flexgen_lite.launcher.supervisor import EngineSupervisor
from flexgen_lite.text.shown import shown_path, shown_text

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

WATCH_SECONDS = 3600.0
KEEP_ALIVE_SECONDS = 130
"""That a connection may be idle. Longer than callers keep theirs (most 5 to 90 s, proxies 60), so that it is they who
close: else a request may be on its way when it is closed here, and end in an error of reading."""


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """
    Attributes:
        host, port: where to listen; port 0 is any that is free.
        api_key: that callers must have.
        data_dir: of files and batches; None: a temporary one, gone with the server.
        model_name: what the model is called instead of by its path.
    """

    host: str
    port: int
    api_key: str | None
    data_dir: Path | None
    model_name: str | None


def serve_http(config: EngineConfig, options: HttpOptions) -> None:
    """Start an engine and serve until interrupted. One that dies is started again, what is open waits for it.

    Raises:
        EngineError: the engine could not be started, or failed for good.
        ValueError: the address cannot be listened to.
    """
    _need_extra()
    _check_data_dir(options.data_dir)
    with (
        _until_interrupted(),
        _listen(options.host, options.port) as listening,
        _folder(options.data_dir) as folder,
        EngineSupervisor(config, on_log=log, on_plan=log) as engine,
    ):
        _serve(engine.connect, listening, folder, options)


def serve_http_at(endpoint: str, key_file: Path | None, options: HttpOptions) -> None:
    """The same in front of a running engine."""
    _need_extra()
    _check_data_dir(options.data_dir)
    with (
        _until_interrupted(),
        _listen(options.host, options.port) as listening,
        _folder(options.data_dir) as folder,
    ):
        _serve(lambda: Client(endpoint, key_file=key_file), listening, folder, options)


def read_api_key(key: str | None, file: Path | None) -> str | None:
    """
    Raises:
        ValueError: both are given, or the key is empty.
    """
    if key is not None and file is not None:
        raise ValueError("--api-key and --api-key-file exclude each other: give one of them")
    if file is not None:
        key = file.read_text(encoding="utf-8").strip()
    if key is not None and (not key or not key.isascii() or not key.isprintable()):
        raise ValueError(f"the API key{f' in {file}' if file else ''} is empty or has characters a header cannot have")
    return key


def _need_extra() -> None:
    try:
        import python_multipart  # noqa: F401  # which takes uploads
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'flexgen-lite[serve]'") from None


def _check_data_dir(data_dir: Path | None) -> None:
    """Before the engine is started."""
    if data_dir is not None and data_dir.exists() and not data_dir.is_dir():
        raise ValueError(f"{data_dir} is no directory: give another --data-dir")


def _listen(host: str, port: int) -> socket.socket:
    """At once, before the engine is started: that takes long."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=512)
    except (OSError, UnicodeError) as error:  # a name that is too long to be one cannot even be looked up
        reason = shown_path(error.strerror) if isinstance(error, OSError) else "it is no name of a host"
        raise ValueError(f"cannot listen on {shown_text(host)}, port {port}: {reason}: choose another one") from error


@contextlib.contextmanager
def _folder(data_dir: Path | None) -> Iterator[Path]:
    """Of files and batches; at once, as above."""
    if data_dir is None:
        with tempfile.TemporaryDirectory(prefix="flexgen-lite-") as folder:
            yield Path(folder)
    else:
        with _locked(data_dir):
            yield data_dir


def _serve(connect: Callable[[], Client], listening: socket.socket, folder: Path, options: HttpOptions) -> None:
    import uvicorn

    from flexgen_lite.http.app import Api

    if options.api_key is None and not _is_loopback(options.host):
        log(f"warning: whoever reaches {options.host} may use the engine: give an API key")
    api = Api(connect, folder, options.model_name, options.api_key)
    with contextlib.closing(api.batches):
        server = uvicorn.Server(_settings(api.app))
        host, port = listening.getsockname()[:2]
        print(f"serving: http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        with _watched(connect(), server) as failure:
            server.run(sockets=[listening])
        if failure:
            raise failure[0]


def _settings(app: ASGIApp) -> uvicorn.Config:
    import uvicorn

    return uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )


@contextlib.contextmanager
def _until_interrupted() -> Iterator[None]:
    try:
        with signals_interrupt():
            yield
    except KeyboardInterrupt:
        print("stopped", flush=True)


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Two servers would write the same batches."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{data_dir} is in use by another server: give another --data-dir") from None
        yield


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextlib.contextmanager
def _watched(client: Client, server: uvicorn.Server) -> Iterator[list[EngineError]]:
    """Ends the server when the engine fails for good; the list then has why."""
    failure: list[EngineError] = []
    closing = threading.Event()

    def watch() -> None:
        try:
            while not closing.is_set():
                client.wait_for_end(WATCH_SECONDS)
        except EngineError as error:
            if not closing.is_set():
                failure.append(error)
                server.should_exit = True

    threading.Thread(target=watch, name="flexgen-lite watch", daemon=True).start()
    try:
        yield failure
    finally:
        closing.set()
        client.close()

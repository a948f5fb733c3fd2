"""The engine's configuration: frozen and strict, from a YAML file, options, or both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from flexgen_lite.sizes import parse_size

MAX_SOCKET_PATH = 107
"""Longest path that a unix socket can have, in bytes."""

_MAX_CPU = 65535


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names key, value and remedy.

    Attributes:
        problems: per key, what is wrong with it.
    """

    def __init__(self, problems: Mapping[str, str], origins: Mapping[str, str] | None = None) -> None:
        self.problems = dict(problems)
        origins = origins or {}
        super().__init__("; ".join(text + origins.get(key, "") for key, text in self.problems.items()))


def _auto_is_none(value: object) -> object:
    return None if value == "auto" else value


def _size(value: object) -> object:
    return None if value is None or value == "auto" else parse_size(value)  # type: ignore[arg-type]


def _cpus(value: object) -> tuple[int, ...]:
    """CPU numbers from a list of numbers, or from the notation of taskset: "0-7,16"."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*", value, re.ASCII):
        cpus: list[int] = []
        for part in value.split(","):
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    elif isinstance(value, list | tuple) and all(type(cpu) is int for cpu in value):
        cpus = list(value)
    else:
        raise ValueError("not a list of CPU numbers")
    if not cpus or min(cpus) < 0 or max(cpus) > _MAX_CPU or len(set(cpus)) != len(cpus):
        raise ValueError("no CPU, an impossible one, or one twice")
    return tuple(cpus)


def _cpu_set(value: object) -> object:
    return None if value is None or value == "auto" else _cpus(value)


def _cpu_sets(value: object) -> object:
    if value is None or value == "auto":
        return None
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("not a list with one entry per worker")
    return tuple(_cpus(item) for item in value)


def _path(value: object) -> object:
    return Path(value) if isinstance(value, str) and value else value


def _device(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value, re.ASCII):
        raise ValueError("not a device")
    return value


def _page_tokens(value: object) -> object:
    if value is None or value == "auto":
        return None
    if type(value) is not int or value not in (8, 16, 32, 64, 128, 256):
        raise ValueError("not a power of two in range")
    return value


def _endpoint(value: object) -> object:
    if value is None or value == "auto":
        return None
    path = value.removeprefix("ipc://") if isinstance(value, str) and value.startswith("ipc://") else ""
    if not path or path.startswith("@") or len(path.encode()) > MAX_SOCKET_PATH:
        raise ValueError("not an ipc endpoint")
    return value


def _expects(text: str) -> dict[str, Any]:
    return {"expects": text}


def _count(low: int, description: str) -> Any:
    return Field(
        default=None,
        ge=low,
        description=description,
        json_schema_extra=_expects(f'a whole number from {low} up, or "auto"'),
    )


_SIZE_EXPECTED = _expects('a size such as "8GiB", "500MB" or a number of bytes, above 0, or "auto"')
_CPUS_EXPECTED = _expects('CPU numbers without repetition, such as [0, 1] or "0-7,16", or "auto"')
_SECONDS_EXPECTED = _expects("a number of seconds above 0")

Count = Annotated[int | None, BeforeValidator(_auto_is_none)]
Size = Annotated[int | None, BeforeValidator(_size)]
Cpus = Annotated[tuple[int, ...] | None, BeforeValidator(_cpu_set)]


class EngineConfig(BaseModel):
    """What a user decides about an engine; None stands for "auto".

    Raises:
        ConfigError: an unknown key or an impossible value.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    model: str = Field(
        min_length=1,
        description="Hugging Face model directory, or a hub id where there is a network.",
        json_schema_extra=_expects("a model directory or a hub id"),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type that weights, activations and KV cache are held and computed in.",
        json_schema_extra=_expects('"auto", "float32", "bfloat16" or "float16"'),
    )
    device: Annotated[str, BeforeValidator(_device)] = Field(
        default="auto",
        description="Compute device of the matrix products.",
        json_schema_extra=_expects('"auto", "cpu", "cuda" or "cuda:N"'),
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto",
        description='"dummy" takes random weights from config.json alone, for benchmarks.',
        json_schema_extra=_expects('"auto" or "dummy"'),
    )
    ram: Size = Field(
        default=None,
        gt=0,
        description="Budget for everything the engine takes of main memory.",
        json_schema_extra=_SIZE_EXPECTED,
    )
    gpu: Size = Field(
        default=None,
        gt=0,
        description="Budget for everything the engine takes of GPU memory.",
        json_schema_extra=_SIZE_EXPECTED,
    )
    max_model_len: Count = _count(1, "Most tokens of one sequence, prompt and generated ones together.")
    max_sequences: Count = _count(1, "Most sequences running at once.")
    micro_batches: Count = _count(1, "Micro-batches of a block.")
    micro_batch_tokens: Count = _count(1, "Most tokens of one micro-batch.")
    page_tokens: Annotated[int | None, BeforeValidator(_page_tokens)] = Field(
        default=None,
        description="Tokens of one KV page.",
        json_schema_extra=_expects('a power of two from 8 to 256, or "auto"'),
    )
    layer_slots: Count = _count(2, "Layer slots in main memory.")
    attention_workers: Count = _count(1, "Attention worker processes.")
    attention_threads: Count = _count(1, "Threads of each attention worker.")
    compute_threads: Count = _count(1, "Threads of the compute worker.")
    loader_threads: Count = _count(1, "Reads that the disk loader keeps in flight.")
    attention_cpus: Annotated[tuple[tuple[int, ...], ...] | None, BeforeValidator(_cpu_sets)] = Field(
        default=None,
        description="CPUs of each attention worker, one entry per worker.",
        json_schema_extra=_expects(
            'one list of CPUs per worker, such as [[0, 1], [2, 3]] or ["0-7", "8-15"], or "auto"'
        ),
    )
    compute_cpus: Cpus = Field(
        default=None, description="CPUs of the compute worker.", json_schema_extra=_CPUS_EXPECTED
    )
    loader_cpus: Cpus = Field(
        default=None, description="CPUs of the disk loader.", json_schema_extra=_CPUS_EXPECTED
    )
    stage_weights: Annotated[bool | None, BeforeValidator(_auto_is_none)] = Field(
        default=None,
        description="Copy each layer to a slot on the device before use; auto does so on CUDA.",
        json_schema_extra=_expects('true, false or "auto"'),
    )
    trace: Annotated[Path | None, BeforeValidator(_path)] = Field(
        default=None,
        description="File that a trace of all lanes is written to (Chrome trace event JSON).",
        json_schema_extra=_expects("the path of a file"),
    )
    endpoint: Annotated[str | None, BeforeValidator(_endpoint)] = Field(
        default=None,
        description="Where clients connect; by default a socket in the engine's private directory.",
        json_schema_extra=_expects(
            f"ipc:// and the path of a socket, at most {MAX_SOCKET_PATH} bytes long (other transports are not supported)"
        ),
    )
    start_timeout: float = Field(
        default=600.0,
        gt=0,
        le=1e9,
        description="Seconds that the engine may take to become ready.",
        json_schema_extra=_SECONDS_EXPECTED,
    )
    worker_timeout: float = Field(
        default=300.0,
        gt=0,
        le=1e9,
        description="Seconds that a worker may take for one order before it is given up.",
        json_schema_extra=_SECONDS_EXPECTED,
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_problems(error)) from None

    @model_validator(mode="after")
    def _one_cpu_set_per_worker(self) -> Self:
        workers, cpus = self.attention_workers, self.attention_cpus
        if workers is not None and cpus is not None and len(cpus) != workers:
            raise ConfigError(
                {
                    "attention_cpus": f"attention_cpus has {len(cpus)} entries for attention_workers={workers}: "
                    "give one entry per worker"
                }
            )
        return self

    @classmethod
    def load(
        cls,
        path: str | Path | None,
        overrides: Mapping[str, Any] | None = None,
        *,
        source: str = "the options",
    ) -> Self:
        """Read a YAML file, if any, and lay `overrides` over it.

        Args:
            path: of the file.
            overrides: values that win over the file's.
            source: what to call the overrides in an error.
        """
        overrides = overrides or {}
        from_file = {} if path is None else _read_yaml(Path(path))
        try:
            return cls(**{**from_file, **overrides})
        except ConfigError as error:
            origins = {
                key: _origin(key, path, from_file, overrides, source)
                for key in error.problems
                if key in from_file or key in overrides
            }
            raise ConfigError(error.problems, origins) from None

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


def parse_setting(text: str) -> tuple[str, Any]:
    """Read "key=value" as a line of the YAML file would be read.

    Raises:
        ConfigError: no such key, or not of that form.
    """
    key, equals, raw = text.partition("=")
    key = key.strip().replace("-", "_")
    if not equals:
        raise ConfigError({key: f'"{text}" is not a setting: write key=value'})
    if key not in EngineConfig.model_fields:
        raise ConfigError({key: _unknown_key(key)})
    if key in ("model", "trace", "endpoint"):
        return key, raw
    try:
        return key, yaml.load(raw, _StrictLoader)  # noqa: S506: a SafeLoader
    except yaml.YAMLError:
        raise ConfigError({key: _refusal(key, raw)}) from None


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)  # noqa: S506: a SafeLoader
    except OSError as error:
        raise ConfigError({"config": f"config={str(path)!r} cannot be read: {error.strerror}"}) from None
    except UnicodeDecodeError:
        raise ConfigError(
            {"config": f"config={str(path)!r} is not text in UTF-8: give a YAML file"}
        ) from None
    except yaml.MarkedYAMLError as error:
        where = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(
            {"config": f"config={str(path)!r}{where} is not good YAML: {error.problem}"}
        ) from None
    except yaml.YAMLError:
        raise ConfigError(
            {"config": f"config={str(path)!r} is not good YAML: give lines of key: value"}
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(
            {"config": f"config={str(path)!r} has no keys at its top: give lines of key: value"}
        )
    return values


def _origin(
    key: str, path: str | Path | None, from_file: Mapping[str, Any], overrides: Mapping[str, Any], source: str
) -> str:
    if key not in overrides:
        return f" (in {path})"
    return f" (from {source}, over {from_file[key]!r} in {path})" if key in from_file else f" (from {source})"


def _unknown_key(key: str) -> str:
    return f"{key} is not a configuration key: {_nearest(key, EngineConfig.model_fields)}"


def _nearest(key: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    names = list(known)
    close = get_close_matches(key.replace("-", "_").lower(), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"the keys are {', '.join(names)}"


def _refusal(key: str, value: object) -> str:
    field: FieldInfo = EngineConfig.model_fields[key]
    expects = field.json_schema_extra["expects"] if isinstance(field.json_schema_extra, dict) else ""
    shown = repr(value)
    return f"{key}={shown if len(shown) <= 80 else shown[:80] + '...'} is not allowed: give {expects}"


def _problems(error: ValidationError) -> dict[str, str]:
    problems: dict[str, str] = {}
    for item in error.errors(include_url=False):
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            problems.update(cause.problems)
            continue
        key = str(item["loc"][0])
        if item["type"] == "extra_forbidden":
            problems.setdefault(key, _unknown_key(key))
        elif item["type"] == "missing":
            problems.setdefault(key, f"{key} is missing: give {_refusal(key, None).rpartition(': give ')[2]}")
        else:
            problems.setdefault(key, _refusal(key, item["input"]))
    return problems

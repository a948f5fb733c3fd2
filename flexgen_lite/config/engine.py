"""The engine's configuration: frozen and strict, from a YAML file, options, or both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flexgen_lite.config.checks import conflicts
from flexgen_lite.config.file import StrictLoader, YamlError, read_yaml
from flexgen_lite.config.problems import ConfigError, problems_of, refusal, unknown_key
from flexgen_lite.config.values import (
    CPU_SETS_EXPECTED,
    CPUS_EXPECTED,
    DEVICE_EXPECTED,
    ENDPOINT_EXPECTED,
    ENGINES_EXPECTED,
    MAX_SECONDS,
    NAMES_EXPECTED,
    SECONDS_EXPECTED,
    SIZE_EXPECTED,
    AutoPath,
    Count,
    Cpus,
    CpuSets,
    Device,
    Endpoint,
    Engines,
    ModelName,
    Names,
    PageTokens,
    PathValue,
    Size,
    Switch,
    count,
    expects,
    switch,
)
from flexgen_lite.text.shown import shown, shown_path, shown_text

MAX_WORKERS, MAX_THREADS = 128, 1024  # beyond any machine; a slip is told before it starts processes


class EngineConfig(BaseModel):
    """What a user decides about an engine; None stands for "auto".

    Raises:
        ConfigError: an unknown key or an impossible value.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    model: ModelName = Field(
        description="Hugging Face model directory, a GGUF file, or a hub id where there is a network.",
        json_schema_extra=expects("a model directory or a hub id"),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of weights, activations and, unless `kv_dtype` says otherwise, KV cache. `auto`: the "
        "checkpoint's own on CUDA, and where it is float32; a 16-bit checkpoint on a CPU becomes bfloat16 where the "
        "processor has instructions for it, or where it is measured to be faster than float32 at start, else float32.",
        json_schema_extra=expects('"auto", "float32", "bfloat16" or "float16"'),
    )
    kv_dtype: Literal["auto", "int8"] = Field(
        default="auto",
        description="Type of the KV cache. `int8`: half the bytes of 16 bits, so that twice as many tokens have room "
        "and attention reads half as much; keys and values are rounded, each token's and head's with a scale of its "
        "own. `auto`: that of `dtype`.",
        json_schema_extra=expects('"auto" or "int8"'),
    )
    device: Device = Field(
        default="auto",
        description="Where the matrix products are computed. `auto`: the first GPU that PyTorch sees, else the CPU. "
        "What has run on a GPU is in [gpu.md](gpu.md).",
        json_schema_extra=DEVICE_EXPECTED,
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto",
        description="`dummy`: random weights from `config.json` alone, for benchmarks.",
        json_schema_extra=expects('"auto" or "dummy"'),
    )
    quantization: Literal["auto", "int8", "int4"] = Field(
        default="auto",
        description="Keep the weights of linear layers and experts in so few bits, in RAM and on their way to a GPU: "
        "they are quantised while they are loaded. `auto`: as the checkpoint has them. See "
        "[quantization.md](quantization.md).",
        json_schema_extra=expects('"auto", "int8" or "int4"'),
    )
    quantization_group_size: Count = count(
        16,
        "Inputs of a layer that share a scale, a multiple of 16 that divides their number. `auto`: 128 for `int8`, 32 "
        "for `int4`, or the largest below that fits the model.",
    )
    quantization_symmetric: Switch = switch(
        "Groups of `int4` have no zeros, which costs some quality; other programs read more of such checkpoints. "
        "`auto`: those of experts have none, all others have."
    )
    quantization_ignore: Names = Field(
        default=None,
        description="Layers that stay in 16 bits, in the manner of compressed-tensors: names, or regular expressions "
        "behind `re:`. `auto`: the head, and what chooses experts.",
        json_schema_extra=NAMES_EXPECTED,
    )
    activations: Literal["auto", "bfloat16", "int8"] = Field(
        default="auto",
        description="What weights in few bits are multiplied in. `bfloat16`: unpacked where they are used, exact. "
        "`int8`: activations are rounded to 8 bits as they come, group by group. `auto`: `bfloat16`.",
        json_schema_extra=expects('"auto", "bfloat16" or "int8"'),
    )
    verify_weights: Switch = switch(
        "Compare weights, whenever they are read, with the checksums that were recorded when they were first loaded; a "
        "difference ends the engine with an error that names the file. `auto`: `false`."
    )
    ram: Size = Field(
        default=None,
        gt=0,
        description="Everything the engine takes of main memory: processes, shared memory, page cache. `auto`: 85 % "
        "of what is free at start, within the cgroup's limit.",
        json_schema_extra=SIZE_EXPECTED,
    )
    gpu: Size = Field(
        default=None,
        gt=0,
        description="Everything it takes of GPU memory. `auto`: 90 % of the GPU's. Without effect on a CPU.",
        json_schema_extra=SIZE_EXPECTED,
    )
    max_model_len: Count = count(
        1,
        "Most tokens of one sequence, prompt and generated ones together. `auto`: the model's limit; for rotary "
        "embeddings of type `longrope` or `dynamic` the original context.",
    )
    max_sequences: Count = count(
        1,
        "Most sequences running at once. `auto`: 256, or as many as `run-batch` has lines. Never more than "
        "`micro_batches` x `micro_batch_tokens`.",
    )
    micro_batches: Count = count(
        1,
        "Most micro-batches of a pass. If set, a pass uses all of them, evenly filled; with `auto` on a CPU as few as"
        " will do. `auto`: 1 to 4, by the budget; 4 beside a GPU.",
    )
    micro_batch_tokens: Count = count(
        1,
        "Most tokens of one micro-batch; longer prompts come in chunks. `auto`: 64 to 2048, by the budget.",
    )
    page_tokens: PageTokens = Field(
        default=None,
        description="Tokens of one KV page. `auto`: 16.",
        json_schema_extra=expects('a power of two from 16 to 256, or "auto"'),
    )
    prefix_caching: Switch = switch(
        "Prompts that begin alike share the KV pages of their beginning, which is computed once. In bfloat16 and "
        "float16 an answer's rounding then depends on what else runs; `auto`: in float32 only."
    )
    kv_disk: Size = Field(
        default=None,
        gt=0,
        description="Room on disk for KV of sequences that have to make room for others: read back, not computed "
        "again. With `prefix_caching`, half of it is for beginnings of prompts, which stay. `auto`: none.",
        json_schema_extra=SIZE_EXPECTED,
    )
    kv_disk_dir: AutoPath = Field(
        default=None,
        description="Where that is: a directory on a fast disk of this machine. `auto`: `flexgen-lite/kv` in "
        "`$XDG_CACHE_HOME`, or in `~/.cache`.",
        json_schema_extra=expects('the path of a directory, or "auto"'),
    )
    layer_slots: Count = count(
        2,
        "Layer slots in main memory. A number below the model's layers streams all layers through so many slots. "
        "`auto`: all layers stay if there is room; else 2 slots (3 beside a GPU, 2 where memory is short), and as "
        "many resident layers as there is room for.",
    )
    device_slots: Count = count(
        2,
        "Layer slots on a GPU. `auto`: as many as `gpu` allows. Layers stay in all but 3 of them, and leave their "
        "place in main memory to others where that is short.",
    )
    engines: Engines = Field(
        default=1,
        description="Engines behind one queue: each has its share of RAM and CPUs, and a GPU of its own; weights that "
        "stay in main memory are there once. `auto`: one per GPU, without one per NUMA node. See "
        "[scaling.md](scaling.md).",
        json_schema_extra=ENGINES_EXPECTED,
    )
    attention_workers: Count = count(
        1,
        "Attention worker processes. `auto`: as many as `attention_cpus` has entries, else one per NUMA node.",
        MAX_WORKERS,
    )
    attention_threads: Count = count(
        1,
        "Threads of each. `auto`: one per physical core, divided among the workers; beside a GPU two cores are left "
        "out.",
        MAX_THREADS,
    )
    compute_threads: Count = count(
        1,
        "Threads of the compute worker. `auto`: one per physical core; beside a GPU at most 4.",
        MAX_THREADS,
    )
    loader_threads: Count = count(
        1,
        "Reads that the disk loader keeps in flight. `auto`: 4.",
        MAX_THREADS,
    )
    attention_cpus: CpuSets = Field(
        default=None,
        description='Such as `["0-7", "8-15"]`. `auto`: not bound.',
        json_schema_extra=CPU_SETS_EXPECTED,
    )
    compute_cpus: Cpus = Field(
        default=None,
        description="Of the compute worker. `auto`: not bound.",
        json_schema_extra=CPUS_EXPECTED,
    )
    loader_cpus: Cpus = Field(
        default=None,
        description="Of the disk loader. `auto`: not bound.",
        json_schema_extra=CPUS_EXPECTED,
    )
    stage_weights: Switch = switch(
        "Copy each layer to a slot on the device before use. `auto`: on CUDA only; leave it so, except to try the "
        "staging path on a CPU."
    )
    cpu_projections: Literal["auto", "none", "qkv"] = Field(
        default="auto",
        description="What of a layer is computed on the CPU beside a GPU. `qkv`: the projections that lead to "
        "attention (Q, K and V), of layers that do not stay on the GPU; their weights stay in main memory and are "
        "copied only in passes with many rows of prompts. `none`: nothing. `auto`: nothing, or what `plan` "
        "predicts to be faster, where both were measured. When it pays: [gpu.md](gpu.md#projections-on-the-cpu).",
        json_schema_extra=expects('"auto", "none" or "qkv"'),
    )
    trace: PathValue = Field(
        default=None,
        description="File for a trace with one row per lane (Chrome trace event JSON; opens in Perfetto).",
        json_schema_extra=expects("the path of a file"),
    )
    endpoint: Endpoint = Field(
        default=None,
        description="Where clients connect. `auto`: a socket in the engine's private directory. A path where "
        "something else is, is refused. Over `tcp://` only with a `key_file`.",
        json_schema_extra=ENDPOINT_EXPECTED,
    )
    key_file: PathValue = Field(
        default=None,
        description="Made by `flexgen-lite keygen FILE`; clients must hold the same file, and all between them and "
        "the engine is encrypted (ZeroMQ CURVE).",
        json_schema_extra=expects("the path of a file made by `flexgen-lite keygen`"),
    )
    start_timeout: float = Field(
        default=600.0,
        gt=0,
        le=MAX_SECONDS,
        description="That the engine may take to become ready.",
        json_schema_extra=SECONDS_EXPECTED,
    )
    worker_timeout: float = Field(
        default=300.0,
        gt=0,
        le=MAX_SECONDS,
        description="That a worker may take for one order before it is given up.",
        json_schema_extra=SECONDS_EXPECTED,
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(problems_of(error, type(self).model_fields)) from None

    @model_validator(mode="after")
    def _no_conflicts(self) -> Self:
        if found := conflicts(self):
            raise ConfigError(found)
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
        try:
            from_file = {} if path is None else read_yaml(Path(path))
        except YamlError as error:
            raise ConfigError({"config": str(error)}) from None
        try:
            return cls(**{**from_file, **overrides})
        except ConfigError as error:
            origins = {
                key: _origin(key, path, from_file, overrides, source)
                for key in error.problems
                if key in from_file or key in overrides
            }
            raise ConfigError(error.problems, origins) from None

    def stored_kv_dtype(self, dtype: str) -> str:
        """What `kv_dtype` comes to for a model of `dtype`."""
        return dtype if self.kv_dtype == "auto" else self.kv_dtype

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
        raise ConfigError({key: f'"{shown_text(text)}" is not a setting: write key=value'})
    if key not in EngineConfig.model_fields:
        raise ConfigError({key: unknown_key(key, EngineConfig.model_fields)})
    if key in ("model", "trace", "endpoint", "key_file", "kv_disk_dir"):
        return key, raw
    try:
        return key, yaml.load(raw, StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError):  # a number of too many digits, or a date that is none
        raise ConfigError({key: refusal(key, raw, EngineConfig.model_fields)}) from None


def _origin(
    key: str, path: str | Path | None, from_file: Mapping[str, Any], overrides: Mapping[str, Any], source: str
) -> str:
    if key not in overrides:
        return f" (in {shown_path(path)})"
    if key in from_file:
        return f" (from {source}, over {shown(from_file[key])} in {shown_path(path)})"
    return f" (from {source})"

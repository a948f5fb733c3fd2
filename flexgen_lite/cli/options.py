"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(help="Hugging Face model directory or hub id.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file; flags win over it.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.")]
KvDtype = Annotated[str | None, typer.Option(help="Of the KV cache: auto or int8.")]
Quantization = Annotated[str | None, typer.Option(help="Of weights: auto, int8 or int4.")]
Activations = Annotated[str | None, typer.Option(help="Of products with quantised weights: bfloat16 or int8.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Ram = Annotated[str | None, typer.Option(help="Budget of main memory, such as 8GiB.")]
Gpu = Annotated[str | None, typer.Option(help="Budget of GPU memory, such as 14GiB.")]
KvDisk = Annotated[str | None, typer.Option(help="Room on disk for KV of sequences that wait, such as 200GiB.")]
Engines = Annotated[str | None, typer.Option(metavar="N|auto", help="Engines behind one queue: auto is one per GPU.")]
AttentionWorkers = Annotated[str | None, typer.Option(help="Number of attention workers, or auto.")]
LoadFormat = Annotated[str | None, typer.Option(help="auto, or dummy for random weights from config.json.")]
Trace = Annotated[Path | None, typer.Option(help="Write a trace of all lanes to this file.")]
MaxModelLen = Annotated[str | None, typer.Option(help="Most tokens of one sequence, or auto.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Tell of warnings and errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Tell everything as JSON, one object a line.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other configuration key.")]
Allow = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="A setting that may be chosen where it is faster, once it is measured."),
]
Endpoint = Annotated[str | None, typer.Option(help="Endpoint of a running engine, ipc://... or tcp://HOST:PORT.")]
KeyFile = Annotated[Path | None, typer.Option(help="Key file of the engine at --endpoint, where it has one.")]

ENGINE_FLAGS = (
    "dtype", "kv_dtype", "quantization", "activations", "device", "ram", "gpu", "kv_disk", "engines",
    "attention_workers", "load_format", "trace", "max_model_len",
)  # fmt: skip
"""Configuration keys with a flag of their own, in every command that starts an engine."""

"""The command line. What is heavy is imported inside the commands, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexgen_lite.cli.group import Group
from flexgen_lite.cli.options import (
    ENGINE_FLAGS,
    Activations,
    Allow,
    AsJson,
    AttentionWorkers,
    Config,
    Device,
    Dtype,
    Endpoint,
    Engines,
    Gpu,
    KeyFile,
    KvDisk,
    KvDtype,
    LoadFormat,
    MaxModelLen,
    Model,
    Quantization,
    Quiet,
    Ram,
    Set,
    Trace,
)

if TYPE_CHECKING:
    from flexgen_lite.config.engine import EngineConfig


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Large language models over big batches of prompts on one ordinary machine.",
)


def main() -> None:
    """The entry point."""
    app(prog_name="flexgen-lite")


def _print_version(wanted: bool) -> None:
    if wanted:
        from flexgen_lite import __version__

        typer.echo(f"flexgen-lite {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run_batch(
    input_file: Annotated[Path, typer.Option("-i", "--input-file", help="Requests, in the OpenAI batch format.")],
    output_file: Annotated[Path, typer.Option("-o", "--output-file", help="Results, one a line.")],
    model: Model = None,
    endpoint: Endpoint = None,
    key_file: KeyFile = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Discard results that are there, not resume.")] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Only lines I, I + N, I + 2N, ..., the first line being 0.")
    ] = None,
    allow: Allow = None,
    config: Config = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    quantization: Quantization = None,
    activations: Activations = None,
    device: Device = None,
    ram: Ram = None,
    gpu: Gpu = None,
    kv_disk: KvDisk = None,
    engines: Engines = None,
    attention_workers: AttentionWorkers = None,
    load_format: LoadFormat = None,
    trace: Trace = None,
    max_model_len: MaxModelLen = None,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Run a file of requests, on an engine of its own or on a running one (--endpoint).

    Given the same arguments again, it goes on where it stopped.
    """
    from flexgen_lite.batch.run import check_files
    from flexgen_lite.batch.shard import WHOLE, Shard
    from flexgen_lite.cli.console import errors_told, make_console
    from flexgen_lite.cli.run_batch import run_on_endpoint, run_on_own_engine

    flags = _engine_flags(locals())
    with make_console(quiet, as_json) as console, errors_told(console):
        lines = WHOLE if shard is None else Shard.parse(shard)
        check_files(input_file, output_file, trace)
        if endpoint is None:
            if key_file is not None:
                flags["key_file"] = str(key_file)
            engine = _engine_config(config, model, flags, settings)
            run_on_own_engine(engine, input_file, output_file, overwrite, console, allow or (), lines)
        else:
            _refuse_engine_flags({"config": config, "set": settings, "allow": allow, **flags})
            run_on_endpoint(endpoint, key_file, model, input_file, output_file, overwrite, console, lines)


@app.command()
def launch(
    model: Model = None,
    config: Config = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    quantization: Quantization = None,
    activations: Activations = None,
    device: Device = None,
    ram: Ram = None,
    gpu: Gpu = None,
    kv_disk: KvDisk = None,
    engines: Engines = None,
    attention_workers: AttentionWorkers = None,
    load_format: LoadFormat = None,
    trace: Trace = None,
    max_model_len: MaxModelLen = None,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Start an engine and serve clients until Ctrl-C or SIGTERM."""
    from flexgen_lite.cli.console import errors_told, make_console
    from flexgen_lite.cli.launch import launch_engine

    flags = _engine_flags(locals())
    with make_console(quiet, as_json) as console, errors_told(console):
        launch_engine(_engine_config(config, model, flags, settings), console)


@app.command()
def plan(
    model: Model = None,
    input_file: Annotated[
        Path | None, typer.Option("-i", "--input-file", help="Requests, in the OpenAI batch format.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Without a file: so many requests.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of each of these.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of each answer to these, at most.")] = 64,
    answer_tokens: Annotated[
        str | None, typer.Option(metavar="N|LOW-HIGH", help="Of answers; without it as many as they may have.")
    ] = None,
    machine: Annotated[
        Path | None, typer.Option(help="Predict for the machine that `calibrate -o` wrote this on.")
    ] = None,
    allow: Allow = None,
    config: Config = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    quantization: Quantization = None,
    activations: Activations = None,
    device: Device = None,
    ram: Ram = None,
    gpu: Gpu = None,
    kv_disk: KvDisk = None,
    engines: Engines = None,
    attention_workers: AttentionWorkers = None,
    load_format: LoadFormat = None,
    max_model_len: MaxModelLen = None,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Print where everything would be, how long a job would take, and what would change that. Starts no engine.

    The first time with a model it measures how fast this machine is with it, for about a minute.
    """
    from flexgen_lite.cli.console import errors_told, make_console
    from flexgen_lite.cli.plan import Job, show_plan
    from flexgen_lite.launcher.answers import AnswerTokens

    flags = _engine_flags({**locals(), "trace": None})
    with make_console(quiet, as_json) as console, errors_told(console):
        job = None if requests is None else Job(requests, prompt_tokens, max_tokens)
        if job is not None and input_file is not None:
            raise ValueError("--requests and -i exclude each other: give one of them")
        answers = None if answer_tokens is None else AnswerTokens.parse(answer_tokens)
        engine = _engine_config(config, model, flags, settings)
        show_plan(engine, input_file, job, answers, machine, allow or (), console)


@app.command()
def calibrate(
    model: Model = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write it to this file as well.")] = None,
    config: Config = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    quantization: Quantization = None,
    activations: Activations = None,
    device: Device = None,
    ram: Ram = None,
    gpu: Gpu = None,
    kv_disk: KvDisk = None,
    attention_workers: AttentionWorkers = None,
    load_format: LoadFormat = None,
    max_model_len: MaxModelLen = None,
    settings: Set = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Measure how fast this machine is with a model, for `plan` here, or with -o on another machine."""
    from flexgen_lite.cli.console import errors_told, make_console
    from flexgen_lite.cli.plan import run_calibration

    flags = _engine_flags({**locals(), "engines": None, "trace": None})
    with make_console(quiet, as_json) as console, errors_told(console):
        run_calibration(_engine_config(config, model, flags, settings), output, console)


@app.command()
def serve(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 is any that is free.")] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Key that callers must have; others see it in `ps`.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File that has the key.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Directory of files and batches, kept over restarts.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name of the model in requests and answers.")] = None,
    endpoint: Endpoint = None,
    key_file: KeyFile = None,
    config: Config = None,
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    quantization: Quantization = None,
    activations: Activations = None,
    device: Device = None,
    ram: Ram = None,
    gpu: Gpu = None,
    kv_disk: KvDisk = None,
    engines: Engines = None,
    attention_workers: AttentionWorkers = None,
    load_format: LoadFormat = None,
    trace: Trace = None,
    max_model_len: MaxModelLen = None,
    settings: Set = None,
) -> None:
    """Serve the OpenAI API over HTTP, with an engine of its own or in front of a running one (--endpoint)."""
    from flexgen_lite.cli.serve import HttpOptions, read_api_key, serve_http, serve_http_at

    flags = _engine_flags(locals())
    options = HttpOptions(host, port, read_api_key(api_key, api_key_file), data_dir, served_model_name)
    if endpoint is None:
        if key_file is not None:
            flags["key_file"] = str(key_file)
        serve_http(_engine_config(config, model, flags, settings), options)
    else:
        _refuse_engine_flags({"config": config, "set": settings, "model": model, **flags})
        serve_http_at(endpoint, key_file, options)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Hugging Face model directory or hub id.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to make.")],
    quantization: Annotated[str, typer.Option(help="int8 or int4.")] = "int4",
    group_size: Annotated[int | None, typer.Option(min=16, help="Inputs of a layer that share a scale.")] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--no-symmetric", help="int4 without zeros, or with. Neither: experts alone without."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Layers that stay: names, or regular expressions behind re:.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write a model's weights once in 8 or 4 bits, in the format of compressed-tensors.

    Given the same arguments again, it goes on where it stopped.
    """
    from flexgen_lite.cli.console import errors_told, make_console
    from flexgen_lite.cli.quantize import write_quantized

    with make_console(quiet, as_json) as console, errors_told(console):
        if quantization not in ("int8", "int4"):
            raise ValueError(f"--quantization {quantization} is not allowed: give int8 or int4")
        bits = 8 if quantization == "int8" else 4
        write_quantized(model, output, bits, group_size, symmetric, ignore, console)


@app.command()
def demo(
    records: Annotated[int, typer.Option(min=1, max=1_000_000, help="Number of records to label.")] = 300,
    ram: Ram = None,
    quantization: Quantization = None,
) -> None:
    """Label messy records with the model that comes along, under a small budget.

    With --quantization int8 or int4, once as it is and once so, side by side.
    """
    from flexgen_lite.cli.demo import run_demo
    from flexgen_lite.cli.terminal import signals_interrupt

    with signals_interrupt():
        run_demo(records=records, ram=ram, quantization=quantization)


@app.command()
def status(
    endpoint: Annotated[str, typer.Option(help="Endpoint of a running engine, ipc://... or tcp://HOST:PORT.")],
    key_file: KeyFile = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep showing it, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Print what a running engine is doing."""
    from flexgen_lite.cli.status import show_status

    show_status(endpoint, key_file, watch, as_json)


@app.command()
def report(
    trace: Annotated[Path, typer.Argument(help="A file that --trace has written.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The page to write.")] = Path("report.html"),
) -> None:
    """Make a page of HTML from a trace: lanes, throughput and memory over time, a few passes, the bottleneck."""
    from flexgen_lite.report.page import write_report

    typer.echo(write_report(trace, output))
    typer.echo(f"{output}: open it in a browser")


@app.command()
def doctor(
    model: Annotated[Path | None, typer.Option(help="Model directory; its largest file is read for 2 s.")] = None,
) -> None:
    """Print what this machine offers, and what auto makes of it."""
    from flexgen_lite.cli.doctor import examine

    for subject, finding in examine(model):
        typer.echo(f"{subject:<13}{finding}")


@app.command()
def keygen(key_file: Annotated[Path, typer.Argument(help="The file to make.")]) -> None:
    """Make a key for an engine that listens on tcp:// and for its clients."""
    from flexgen_lite.wire.access import make_key_file

    make_key_file(key_file)
    typer.echo(f"{key_file}: start the engine with --set key_file={key_file}, give clients a copy")


def _engine_flags(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of a command's arguments that are ENGINE_FLAGS."""
    return {name: arguments[name] for name in ENGINE_FLAGS}


def _engine_config(
    path: Path | None, model: str | None, flags: dict[str, Any], settings: list[str] | None
) -> EngineConfig:
    from flexgen_lite.config.engine import EngineConfig, parse_setting

    overrides = dict(parse_setting(text) for text in settings or [])
    for key, value in {"model": model, **flags}.items():
        if value is not None:
            overrides.update([parse_setting(f"{key}={value}")])
    return EngineConfig.load(path, overrides, source="the command line")


def _refuse_engine_flags(flags: dict[str, Any]) -> None:
    given = [f"--{key.replace('_', '-')}" for key, value in flags.items() if value]
    if given:
        raise ValueError(f"{', '.join(given)} cannot change the running engine at --endpoint: leave one or the other")

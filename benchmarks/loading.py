"""How fast weights in few bits are put in order while they are loaded, format by format, beside the disk.

    python -m benchmarks.loading [--directory DIR] [--memory DIR] [--rounds N] [--formats gptq,awq,...]

Of each format a weight of 8192 x 8192 is written to `--memory`, a file system in RAM, and loaded from there by one and
by two threads: that is what loading takes but for the disk. Columns are GB/s of the file's bytes: by the time of one
thread and of two, the median of the rounds; by CPU time, which counts where other processes take the processor; of
reading alone, by CPU time; and what share of the disk's rate one thread, or two, can take in. The disk's rate is that
of direct reads of a file in `--directory`.
"""

from __future__ import annotations

import argparse
import json
import mmap
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flexgen_lite.memory.slot_layout import TensorSource, layout_unit
from flexgen_lite.model.checkpoint import Checkpoint, open_checkpoint
from flexgen_lite.plan.disk_rate import read_rate
from flexgen_lite.wire.worker_messages import AttachLoader, Load
from flexgen_lite.workers.loader.state import LoaderState
from flexgen_lite.workers.model.quantization import HeldBits, stored_packing
from flexgen_lite.workers.model.weight_trace import to_pieces, trace

COLUMNS = WIDTH = 8192
DISK_BYTES = 1 << 30
READ_SECONDS = 4.0
Tensors = dict[str, torch.Tensor]
NAME = "x.weight"


def _random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = dtype.itemsize
    data = torch.randint(0, 126, (*shape[:-1], shape[-1] * size), dtype=torch.uint8)  # no FP8 that is no number
    return data.view(dtype)


def _ones(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.ones(shape).to(dtype)


def _gptq(bits: int = 4, is_sorted: bool = False) -> tuple[Tensors, dict[str, Any]]:
    groups = torch.arange(WIDTH, dtype=torch.int32) // 128
    found = {
        "x.qweight": _random(torch.int32, WIDTH * bits // 32, COLUMNS),
        "x.qzeros": _random(torch.int32, WIDTH // 128, COLUMNS * bits // 32),
        "x.scales": _ones(torch.float16, WIDTH // 128, COLUMNS),
        "x.g_idx": groups[torch.randperm(WIDTH)] if is_sorted else groups,
    }
    return found, {"quant_method": "gptq", "bits": bits, "group_size": 128}


def _awq(version: str) -> tuple[Tensors, dict[str, Any]]:
    groups = WIDTH // 128
    if version == "gemm":
        shapes = (torch.int32, WIDTH, COLUMNS // 8), (torch.int32, groups, COLUMNS // 8), (groups, COLUMNS)
    elif version == "gemv":
        shapes = (torch.int32, COLUMNS, WIDTH // 8), (torch.int32, COLUMNS, groups // 8), (COLUMNS, groups)
    else:
        shapes = (torch.int16, COLUMNS // 4, WIDTH), (torch.float16, groups, COLUMNS), (groups, COLUMNS)
    make_zeros = _ones if version == "gemv_fast" else _random
    found = {"x.qweight": _random(*shapes[0]), "x.qzeros": make_zeros(*shapes[1])}
    found["x.scales"] = _ones(torch.float16, *shapes[2])
    return found, {"quant_method": "awq", "version": version, "group_size": 128}


def _compressed(
    bits: int, group: int = 128, zeros: bool = False, order: bool = False
) -> tuple[Tensors, dict[str, Any]]:
    found = {
        "x.weight_packed": _random(torch.int32, COLUMNS, WIDTH * bits // 32),
        "x.weight_scale": _ones(torch.bfloat16, COLUMNS, WIDTH // group),
        "x.weight_shape": torch.tensor([COLUMNS, WIDTH]),
    }
    if zeros:
        found["x.weight_zero_point"] = _random(torch.int32, COLUMNS * bits // 32, WIDTH // group)
    if order:
        found["x.weight_g_idx"] = (torch.arange(WIDTH, dtype=torch.int32) // group)[torch.randperm(WIDTH)]
    weights = {"num_bits": bits, "type": "int", "symmetric": not zeros, "strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return found, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def _bytes(dtype: torch.dtype) -> tuple[Tensors, dict[str, Any]]:
    found = {"x.weight": _random(dtype, COLUMNS, WIDTH), "x.weight_scale": _ones(torch.bfloat16, COLUMNS, 1)}
    weights = {"num_bits": 8, "type": "int" if dtype == torch.int8 else "float", "strategy": "channel"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return found, {"quant_method": "compressed-tensors", "config_groups": groups}


def _fp8_blocks() -> tuple[Tensors, dict[str, Any]]:
    scales = _ones(torch.float32, COLUMNS // 128, WIDTH // 128)
    return {"x.weight": _random(torch.float8_e4m3fn, COLUMNS, WIDTH), "x.weight_scale_inv": scales}, {
        "quant_method": "fp8", "weight_block_size": [128, 128]
    }  # fmt: skip


def _mxfp4() -> tuple[Tensors, dict[str, Any]]:
    groups = WIDTH // 32
    found = {
        "x_blocks": _random(torch.uint8, 1, COLUMNS, groups, 16), "x_scales": _random(torch.uint8, 1, COLUMNS, groups)
    }  # fmt: skip
    return found, {"quant_method": "mxfp4"}


def _nvfp4() -> tuple[Tensors, dict[str, Any]]:
    found = {
        "x.weight": _random(torch.uint8, COLUMNS, WIDTH // 2),
        "x.weight_scale": _random(torch.float8_e4m3fn, COLUMNS, WIDTH // 16),
        "x.weight_scale_2": torch.tensor(1.0),
    }
    return found, {"quant_method": "modelopt", "quant_algo": "NVFP4"}


def _bitsandbytes(is_double: bool) -> tuple[Tensors, dict[str, Any]]:
    from flexgen_lite.model.packing import TABLES

    blocks = COLUMNS * WIDTH // 64
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [COLUMNS, WIDTH]}
    found = {
        "x.weight": _random(torch.uint8, COLUMNS * WIDTH // 2, 1), "x.weight.quant_map": torch.tensor(TABLES["nf4"])
    }  # fmt: skip
    if is_double:
        found["x.weight.absmax"] = _random(torch.uint8, blocks)
        found["x.weight.nested_absmax"], found["x.weight.nested_quant_map"] = torch.ones(blocks // 256), torch.ones(256)
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    else:
        found["x.weight.absmax"] = torch.ones(blocks)
    data = json.dumps(state).encode()
    found["x.weight.quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return found, {"quant_method": "bitsandbytes", "load_in_4bit": True}


FORMATS: dict[str, Callable[[], tuple[Tensors, dict[str, Any]]]] = {
    "compressed-int4": lambda: _compressed(4),
    "compressed-int4-zeros": lambda: _compressed(4, 32, zeros=True),
    "compressed-int8": lambda: _compressed(8),
    "compressed-int3": lambda: _compressed(3),
    "compressed-int4-g-idx": lambda: _compressed(4, order=True),
    "w8a8": lambda: _bytes(torch.int8),
    "fp8-channel": lambda: _bytes(torch.float8_e4m3fn),
    "fp8-blocks": _fp8_blocks,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "gptq-int4": _gptq,
    "gptq-int8": lambda: _gptq(8),
    "gptq-int3": lambda: _gptq(3),
    "gptq-int2": lambda: _gptq(2),
    "gptq-int4-desc-act": lambda: _gptq(is_sorted=True),
    "awq": lambda: _awq("gemm"),
    "awq-gemv": lambda: _awq("gemv"),
    "awq-gemv-fast": lambda: _awq("gemv_fast"),
    "bnb-nf4": lambda: _bitsandbytes(False),
    "bnb-nf4-double": lambda: _bitsandbytes(True),
}


class Weight:
    """A weight of a format in a directory, ready to be loaded."""

    def __init__(self, directory: Path, name: str, order: str) -> None:
        tensors, section = FORMATS[name]()
        (directory / "config.json").write_text(json.dumps({"quantization_config": section}))
        save_file(tensors, directory / "model.safetensors")
        self._checkpoint: Checkpoint = open_checkpoint(directory)
        weight = trace(next(t for n, t in self._checkpoint.tensors.items() if n in ("x", NAME)), torch.bfloat16)
        packing = stored_packing(NAME, weight.parts, HeldBits({NAME: weight.ndim == 3}, order, False))
        assert packing is not None
        shape = tuple(weight.shape)
        pieces = tuple(piece for part in weight.parts for piece in to_pieces(part, shape, is_packed=True))
        self.num_bytes = sum(piece.num_bytes for piece in pieces)
        self._unit = layout_unit("u", [TensorSource(NAME, "bfloat16", shape, pieces, packing)])

    def seconds(self, threads: int, rounds: int, only_reads: bool = False) -> tuple[float, float]:
        """Medians of the time that loading takes, and of the processors' time."""
        arena, unit, checkpoint = mmap.mmap(-1, self._unit.num_bytes), self._unit, self._checkpoint
        attach = AttachLoader(
            checkpoint.files, checkpoint.stamps, (unit,), (0,), unit.num_bytes, "auto", False, threads, ()
        )
        state = LoaderState(attach, arena)
        times = []
        try:
            state.load(Load(0, 0))
            if only_reads:
                state._batches[0] = [_without_chunks(batch) for batch in state._batches[0]]
            for _ in range(rounds):
                start, used = time.perf_counter(), time.process_time()
                state.load(Load(0, 0))
                times.append((time.perf_counter() - start, time.process_time() - used))
        finally:
            state.close()
        walls, used_times = zip(*times, strict=True)
        return statistics.median(walls), statistics.median(used_times)


def _without_chunks(batch: Any) -> Any:
    from dataclasses import replace

    return replace(batch, chunks=())


def disk_rate(directory: Path) -> float:
    """GB/s of direct reads of a file that is not in memory."""
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        part = torch.randint(0, 255, (64 << 20,), dtype=torch.uint8).numpy().tobytes()
        for _ in range(DISK_BYTES // len(part)):
            file.write(part)
        file.flush()
        return read_rate([Path(file.name)], READ_SECONDS)[0] / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path())
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMATS))
    parser.add_argument("--order", choices=("bfloat16", "int8"), default="bfloat16")
    arguments = parser.parse_args()
    rate = disk_rate(arguments.directory)
    print(f"disk: {rate:.2f} GB/s")
    print(f"{'GB/s':<24}{'1 thread':>10}{'2 threads':>10}{'CPU time':>10}{'reads':>10}   of the disk, 1 and 2 threads")
    for name in arguments.formats:
        directory = Path(tempfile.mkdtemp(dir=arguments.memory))
        try:
            weight = Weight(directory, name, arguments.order)
            (one, used), (two, _) = (weight.seconds(threads, arguments.rounds) for threads in (1, 2))
            _, read = weight.seconds(1, arguments.rounds, only_reads=True)
        finally:
            shutil.rmtree(directory)
        gb = weight.num_bytes / 1e9
        shares = "  ".join(f"{min(1.0, gb / seconds / rate):4.0%}" for seconds in (one, two))
        print(f"{name:<24}{gb / one:10.2f}{gb / two:10.2f}{gb / used:10.2f}{gb / read:10.2f}   {shares}", flush=True)


if __name__ == "__main__":
    main()

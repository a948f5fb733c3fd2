"""`flexgen-lite quantize`: a model's weights written once in few bits. Options of all commands are in main.py."""

from __future__ import annotations

import time
from pathlib import Path

from flexgen_lite.cli.console import Console
from flexgen_lite.cli.terminal import signals_interrupt
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.quantization import IGNORED, Quantization
from flexgen_lite.text.sizes import format_size

_KEYS = {
    "quantization_group_size=": "--group-size ",
    "quantization_symmetric=false": "--no-symmetric",
    "quantization_symmetric=true": "--symmetric",
    "quantization_ignore": "--ignore",
    "leave `quantization` out": "use it as it is, or ignore less",
}


def write_quantized(
    model: str,
    output: Path,
    bits: int,
    group_size: int | None,
    symmetric: bool | None,
    ignore: list[str] | None,
    console: Console,
) -> None:
    """
    Raises:
        ValueError: the model or the output cannot be used, and why.
    """
    from flexgen_lite.workers.compute.model_open import model_directory
    from flexgen_lite.workers.conversion.run import quantize
    from flexgen_lite.workers.serve import UserError

    wanted = Quantization(bits, group_size, IGNORED if ignore is None else tuple(ignore), symmetric=symmetric)
    begun = time.monotonic()

    def told(done: int, total: int) -> None:
        rate = done / max(time.monotonic() - begun, 1e-9)
        console.share(
            f"{format_size(done)} of {format_size(total)} ({done / max(total, 1):.0%}), {format_size(int(rate))}/s",
            {"done_bytes": done, "total_bytes": total},
        )

    try:
        with signals_interrupt():
            made = quantize(model_directory(model), output, wanted, console.interval, told)
    except (CheckpointError, UserError) as error:
        raise ValueError(_as_flags(str(error))) from error
    for warning in made.warnings:
        console.warn(_as_flags(warning))
    text = (
        f"{output}: {made.num_weights} weights in {bits} bits, {format_size(made.num_bytes)} instead of "
        f"{format_size(made.source_bytes)}"
    )
    values = {"num_bytes": made.num_bytes, "source_bytes": made.source_bytes, "num_weights": made.num_weights}
    console.done(f"{text}; it was there already" if made.is_old else text, values)


def _as_flags(message: str) -> str:
    """A message about configuration keys, for whoever gave flags."""
    for key, flag in _KEYS.items():
        message = message.replace(key, flag)
    return message

"""docs/configuration.md, made from the configuration's own definitions: python -m flexgen_lite.config.reference"""

from __future__ import annotations

import sys

from flexgen_lite.config.engine import EngineConfig

INTRODUCTION = """\
# Configuration

<!-- Made by `python -m flexgen_lite.config.reference > docs/configuration.md` from flexgen_lite/config/engine.py. -->

Keys come from a YAML file (`--config`), from flags, from `--set key=value`, or from keyword arguments of `FlexGenLite`.
What is given on the command line wins over the file. An unknown key, a key given twice or an impossible value is an
error that names the key and says what is allowed. `configs/` has commented files to start from;
[budgets.md](budgets.md) says how to choose.

Flags exist for `model`, `dtype`, `kv_dtype`, `quantization`, `activations`, `device`, `ram`, `gpu`, `kv_disk`,
`engines`, `attention_workers`, `load_format`, `trace` and `max_model_len` (with dashes: `--attention-workers`).
Everything else: `--set layer_slots=4`. The plan that is printed at start shows what `auto` became.

Sizes: `8GiB`, `8G` and `8192MiB` count in powers of 1024, `8GB` in powers of 1000; a bare number is bytes.
CPUs: `[0, 1, 2]` or `"0-7,16"`.
"""

GROUPS: dict[str, tuple[str, ...]] = {
    "Model and number format": (
        "model",
        "dtype",
        "kv_dtype",
        "quantization",
        "quantization_group_size",
        "quantization_symmetric",
        "quantization_ignore",
        "activations",
        "device",
        "load_format",
        "verify_weights",
        "max_model_len",
    ),
    "Budgets": ("ram", "gpu"),
    "The block: what goes through all layers for one load of the weights": (
        "max_sequences",
        "micro_batches",
        "micro_batch_tokens",
        "page_tokens",
        "prefix_caching",
        "kv_disk",
        "kv_disk_dir",
        "layer_slots",
        "device_slots",
        "stage_weights",
        "cpu_projections",
    ),
    "Processes, threads, CPUs": (
        "engines",
        "attention_workers",
        "attention_threads",
        "compute_threads",
        "loader_threads",
        "attention_cpus",
        "compute_cpus",
        "loader_cpus",
    ),
    "Outputs, clients, deadlines": ("trace", "endpoint", "key_file", "start_timeout", "worker_timeout"),
}

CLOSING = """\
On a CPU, products and attention take turns unless `micro_batches` is set; then give them fewer threads than cores
together, or CPUs of their own.
"""


def reference() -> str:
    """The page.

    Raises:
        AssertionError: a key is in no group, or in two.
    """
    keys = [key for group in GROUPS.values() for key in group]
    assert sorted(keys) == sorted(EngineConfig.model_fields), "each key belongs to one group"
    parts = [INTRODUCTION]
    for title, group in GROUPS.items():
        rows = "\n".join(_row(key) for key in group)
        parts.append(f"## {title}\n\n| key | value | default | meaning |\n| --- | --- | --- | --- |\n{rows}\n")
    return "\n".join([*parts, CLOSING])


def _row(key: str) -> str:
    field = EngineConfig.model_fields[key]
    extra = field.json_schema_extra
    assert isinstance(extra, dict) and field.description is not None, f"{key} is not described"
    value = str(extra["expects"]).replace("|", "\\|")
    if field.is_required():
        default = "must be given"
    elif field.default is None:
        default = "`auto`" if "`auto`:" in field.description else "none"
    else:
        default = f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"
    return f"| `{key}` | {value} | {default} | {field.description.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    sys.stdout.write(reference())

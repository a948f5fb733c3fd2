"""What keys of the configuration ask for together and cannot have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexgen_lite.text.shown import shown, shown_text

if TYPE_CHECKING:
    from flexgen_lite.config.engine import EngineConfig

_OF_QUANTIZATION = ("quantization_group_size", "quantization_symmetric", "quantization_ignore")


def conflicts(config: EngineConfig) -> dict[str, str]:
    """Per key, what is wrong with it."""
    found = {}
    if config.endpoint is not None and config.endpoint.startswith("tcp://") and config.key_file is None:
        found["endpoint"] = (
            f"endpoint={shown_text(config.endpoint)} needs a key_file, for whoever reaches the port could use the "
            "engine: make one with `flexgen-lite keygen FILE` and give it to the engine and its clients"
        )
    workers, cpus = config.attention_workers, config.attention_cpus
    if workers is not None and cpus is not None and len(cpus) != workers:
        found["attention_cpus"] = (
            f"attention_cpus has {len(cpus)} entries for attention_workers={workers}: give one entry per worker"
        )
    for key in _OF_QUANTIZATION:
        value = getattr(config, key)
        if value is not None and config.quantization == "auto":
            found[key] = (
                f"{key}={shown(value)} is for weights that are quantised here: give quantization as well, int8 or "
                "int4, or leave it out"
            )
    if config.kv_disk_dir is not None and config.kv_disk is None:
        found["kv_disk_dir"] = (
            f"kv_disk_dir={shown(str(config.kv_disk_dir))} has no effect without kv_disk: give kv_disk as well, such "
            "as 200GiB, or leave it out"
        )
    if config.engines != 1:
        found |= _of_several(config)
    return found


def _of_several(config: EngineConfig) -> dict[str, str]:
    """Where there may be several engines."""
    found = {}
    for key in ("attention_cpus", "compute_cpus", "loader_cpus"):
        if getattr(config, key) is not None:
            found[key] = (
                f"{key} would bind the workers of all of engines={config.engines} to the same CPUs: leave it out, each "
                "engine has CPUs of its own"
            )
    if config.device.startswith("cuda:"):
        found["device"] = (
            f"device={config.device} is one GPU for engines={config.engines}: give cuda, and CUDA_VISIBLE_DEVICES for "
            "some of them"
        )
    return found

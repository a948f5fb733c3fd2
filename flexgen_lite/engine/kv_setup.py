"""KV on disk as it follows from the configuration and the plan: files, slots, and what prefixes are kept apart by."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from dataclasses import replace
from pathlib import Path

from flexgen_lite import __version__
from flexgen_lite.config.engine import EngineConfig
from flexgen_lite.engine.events import log
from flexgen_lite.engine.setup import Setup
from flexgen_lite.memory.kv_groups import block_tokens
from flexgen_lite.memory.kv_layout import disk_slot_bytes
from flexgen_lite.memory.park_file import ParkFile
from flexgen_lite.plan.need import shares_prefixes
from flexgen_lite.plan.plan import PlanError
from flexgen_lite.text.shown import shown_path
from flexgen_lite.text.sizes import format_size
from flexgen_lite.wire.kv_on_disk import KvDiskSpec

MOST_PREFIX_SLOTS = 1 << 16  # each takes some 300 bytes of RAM in two processes
KV_DISK_TOTALS = ("parked_sequences", "fetched_sequences", "disk_prefix_tokens", "kv_disk_failures")


def kv_disk_folder(config: EngineConfig) -> Path:
    if config.kv_disk_dir is not None:
        return config.kv_disk_dir.expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexgen-lite" / "kv"


def open_park_file(config: EngineConfig) -> ParkFile | None:
    """The file of parked sequences, where there is to be one. Raises PlanError where it cannot be made."""
    if config.kv_disk is None:
        return None
    folder = kv_disk_folder(config)
    try:
        file = ParkFile(folder)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise PlanError(
            f"kv_disk_dir={shown_path(folder)} cannot be written to ({error.strerror}): give another directory, or "
            "leave kv_disk out"
        ) from error
    if free < config.kv_disk:
        log(
            f"warning: kv_disk={format_size(config.kv_disk)} is more than the {format_size(free)} that are free in "
            f"{shown_path(folder)}: what has no room is computed again"
        )
    return file


def with_kv_on_disk(setup: Setup, config: EngineConfig, lanes: int) -> Setup:
    """The setup, with KV on disk if the configuration has it. `lanes`: tokens whose rows lie across in a page."""
    if config.kv_disk is None:
        return setup
    kv, spec, arenas = setup.kv, setup.spec, setup.arena_bytes
    slot = disk_slot_bytes(kv.page_bytes)
    pages = sum(block_tokens(kv.groups) // group.page_tokens for group in kv.groups)
    prefix_slots = min(MOST_PREFIX_SLOTS, config.kv_disk // 2 // (pages * slot))
    share = shares_prefixes(config.prefix_caching, spec) and prefix_slots > 0
    files = setup.opened.fingerprint, spec.files, spec.stamps, bool(setup.opened.device_total_bytes)
    versions = __version__, importlib.metadata.version("transformers"), importlib.metadata.version("torch")
    identity = repr((versions, files, lanes, replace(kv, num_pages=1)))
    disk = KvDiskSpec(
        kv.page_bytes,
        arenas["kv"],
        spec.state_bytes,
        arenas["states"],
        slot,
        str(kv_disk_folder(config).absolute()),
        identity if share else "",
        prefix_slots if share else 0,
        pages,
    )
    return replace(setup, kv_disk=disk)

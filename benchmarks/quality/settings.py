"""The settings that are compared: a name and options of the engine for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import yaml


@dataclasses.dataclass(frozen=True)
class Setting:
    name: str
    title: str
    options: Mapping[str, Any]


def _setting(name: str, title: str, **options: str) -> Setting:
    return Setting(name, title, {"dtype": "bfloat16", **options})


REFERENCE = _setting("bfloat16", "bfloat16")
SETTINGS = {
    setting.name: setting
    for setting in (
        # what rounding to bfloat16 itself moves: the others' losses are to be seen beside it
        Setting("float32", "float32", {"dtype": "float32"}),
        _setting("int8", "int8 weights", quantization="int8", activations="bfloat16"),
        _setting("int8-a8", "int8 weights and activations", quantization="int8", activations="int8"),
        _setting("int4", "int4 weights", quantization="int4", activations="bfloat16"),
        _setting("int4-a8", "int4 weights, int8 activations", quantization="int4", activations="int8"),
        _setting("kv8", "int8 KV", kv_dtype="int8"),
        _setting("int4-kv8", "int4 weights, int8 KV", quantization="int4", activations="bfloat16", kv_dtype="int8"),
    )
}


def parse_setting(text: str) -> Setting:
    """The name of one of SETTINGS, or `title:key=value,key=value`, with values as YAML has them.

    Raises:
        ValueError: it is neither.
    """
    if text in SETTINGS:
        return SETTINGS[text]
    title, colon, pairs = text.partition(":")
    if not colon or not title or not all("=" in pair for pair in pairs.split(",")):
        raise ValueError(f"setting {text!r}: give one of {', '.join(SETTINGS)}, or TITLE:KEY=VALUE,KEY=VALUE")
    return Setting(title, title, {"dtype": "bfloat16", **parse_options(pairs.split(","))})


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Each `key=value`, with values as YAML has them."""
    split = (pair.partition("=") for pair in pairs)
    return {key.strip(): yaml.safe_load(value) for key, _, value in split}

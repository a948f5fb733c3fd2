"""What the files beside a checkpoint's weights say of how these were quantised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexgen_lite.model.files import CheckpointError, is_there, read_json
from flexgen_lite.text.shown import shown_text

READ = {
    "compressed-tensors": "compressed-tensors", "sparseml": "compressed-tensors",
    "fp8": "fp8", "fbgemm_fp8": "fp8", "mxfp4": "mxfp4", "modelopt": "modelopt", "modelopt_fp4": "modelopt",
    "gptq": "gptq", "awq": "awq", "auto-round": "gptq", "intel/auto-round": "gptq",
    "bitsandbytes": "bitsandbytes", "torchao": "torchao",
}  # fmt: skip
"""Of the methods that config.json names, those that are read, and the format that they are."""
_NOT_READ = (
    "use the unquantised model with `quantization`, or dequantise it: load it with Transformers and save_pretrained it "
    "into a new directory"
)
_OTHER_FILES = (("hf_quant_config.json", "modelopt"), ("quantize_config.json", "gptq"), ("quant_config.json", "awq"))


@dataclass(frozen=True, slots=True)
class Section:
    """
    Attributes:
        format: one of READ's, or "" where nothing is said.
        values: of a `quantization_config`.
        where: it was found, for messages.
    """

    format: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def rounds_activations(self) -> bool:
        """Whether it is meant for products with activations in few bits, too."""
        groups = self.values.get("config_groups")
        groups = groups.values() if isinstance(groups, dict) else ()
        return any(isinstance(group, dict) and group.get("input_activations") is not None for group in groups)


def read_section(directory: Path, config: Mapping[str, Any]) -> Section:
    """What config.json says, or else the files that some tools write beside it.

    Raises:
        CheckpointError: it is a method that is not read.
    """
    nested = config.get("text_config")
    if isinstance(config.get("quantization"), dict) and "bits" in config["quantization"]:
        return _section({"quant_method": "mlx"}, str(directory / "config.json"))
    for part in (config, nested if isinstance(nested, dict) else {}):
        values = part.get("quantization_config") or part.get("compression_config")
        if isinstance(values, dict) and isinstance(values.get("quantization_config"), dict):
            values = {**values["quantization_config"], "quant_method": values.get("quant_method", "compressed-tensors")}
        if isinstance(values, dict) and values:
            return _section(values, str(directory / "config.json"))
    for name, method in _OTHER_FILES:
        if is_there(directory / name):
            values = read_json(directory / name)
            inner = values.get("quantization")
            values = inner if method == "modelopt" and isinstance(inner, dict) else values
            return _section({"quant_method": method, **values}, str(directory / name))
    return Section()


def _section(values: Mapping[str, Any], where: str) -> Section:
    method = values.get("quant_method")
    if method is None:
        method = _told_by_keys(values)
    found = READ.get(str(method).lower())
    if found is None:
        raise CheckpointError(
            f"{where}: the checkpoint is quantised ({shown_text(str(method))}), which is not read: {_NOT_READ}"
        )
    return Section(found, values, where)


def is_auto_round(values: Mapping[str, Any]) -> bool:
    """Whether that is what a section is of."""
    return "packing_format" in values or "auto-round" in str(values.get("quant_method")).lower()


def _told_by_keys(values: Mapping[str, Any]) -> str:
    """Before 2024 some tools left their name out."""
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        return "bitsandbytes"
    if "config_groups" in values:
        return "compressed-tensors"
    if "zero_point" in values and ("version" in values or "w_bit" in values):
        return "awq"
    return "gptq" if "bits" in values and ("desc_act" in values or "sym" in values) else "unknown"

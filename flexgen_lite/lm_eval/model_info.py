"""What the harness records of a model beside its results, under the names of its own `hf` model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, PreTrainedConfig


def model_info(config: PreTrainedConfig, directory: str, revision: str, dtype: str | None) -> dict[str, Any]:
    """
    Args:
        config: of the model.
        directory: or its hub id.
        revision: of the hub.
        dtype: as the engine was told it; None where it was started by somebody else.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        "model_num_parameters": model.num_parameters(),
        "model_dtype": "" if dtype is None else getattr(torch, dtype, dtype),
        "model_revision": revision,
        "model_sha": "" if Path(directory).is_dir() else _sha(directory),
    }


def _sha(hub_id: str) -> str:
    """Of the hub's revision; empty where it does not say."""
    try:
        return str(HfApi().model_info(hub_id).sha)
    except Exception:  # many kinds: no network, no access; it is for the record only
        return ""

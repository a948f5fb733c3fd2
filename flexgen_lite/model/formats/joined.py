"""All formats of checkpoints in few bits that are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.formats import bitsandbytes, compressed_tensors, fp4, fp8, gptq, torchao
from flexgen_lite.model.formats.layers import AGAIN, StoredLayers
from flexgen_lite.model.formats.section import Section
from flexgen_lite.model.spec import SmallSource
from flexgen_lite.model.stored_tensor import StoredTensor

# By their tensors, whatever config.json says: what is left for FP8 is what no other format has taken.
_FORMATS = (compressed_tensors.join, gptq.join, torchao.join, bitsandbytes.join, fp4.join, fp8.join)


def join_layers(
    tensors: Mapping[str, StoredTensor],
    section: Section,
    files: tuple[str, ...],
    metadata: tuple[Mapping[str, str], ...],
    read: Callable[[SmallSource], bytes],
) -> dict[str, StoredTensor]:
    """The tensors, with a stand-in for each weight in few bits in the place of its parts.

    Raises:
        CheckpointError: parts are missing or do not fit, or there are none where `section` says that there are.
    """
    layers = StoredLayers(dict(tensors), section, files, metadata, read)
    for join in _FORMATS:
        join(layers)
    found = layers.tensors
    if (
        section.format
        and not any(tensor.bits or tensor.members or tensor.fault for tensor in found.values())
        and _must_be(section)
    ):
        raise CheckpointError(
            f"{section.where}: it says that the checkpoint is quantised, but none of its weights is: {AGAIN}"
        )
    return found


def _must_be(section: Section) -> bool:
    """Whether weights in 16 bits beside this section are a mistake: fine-tuned models often keep it."""
    groups = section.values.get("config_groups")
    is_for_weights = not isinstance(groups, dict) or any(
        not isinstance(group, dict) or group.get("weights") is not None for group in groups.values()
    )
    is_stored = section.values.get("quantization_status") != "frozen"
    return section.format == "compressed-tensors" and is_for_weights and is_stored

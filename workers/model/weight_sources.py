"""Which stored tensors fill which parameter: Transformers' own renames and conversions, without the data."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from flexgen_lite.model.checkpoint import Checkpoint
from flexgen_lite.model.files import CheckpointError
from flexgen_lite.model.spec import ITEM_BYTES
from flexgen_lite.workers.model.builder import Absent
from flexgen_lite.workers.model.weight_trace import TracedTensor, UntraceableError, trace

_FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class FoundWeights:
    """`traced[name]` tells what fills the model's tensor `name`; `unexpected` stored tensors have no use."""

    traced: dict[str, TracedTensor]
    unexpected: tuple[str, ...]


class TargetDtypes:
    """The dtype of each of the model's tensors, by the rules of `from_pretrained(dtype=...)`.

    A tensor has the dtype that its class made it with, unless the class wants it kept in float32.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._patterns: list[tuple[re.Pattern[str], torch.dtype]] = [
            (re.compile(pattern.replace("*", ".*")), kept) for pattern, kept in model._get_dtype_plan(dtype).items()
        ]

    def of(self, name: str, tensor: torch.Tensor) -> torch.dtype:
        for pattern, kept in self._patterns:
            if pattern.search(name):
                return kept
        return tensor.dtype


def compile_conversions() -> None:
    """Transformers' patterns for checkpoints of all model types, a thousand: it keeps them once they are compiled."""
    get_checkpoint_conversion_mapping("")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def find_weights(
    model: PreTrainedModel, checkpoint: Checkpoint, dtypes: TargetDtypes, unused: frozenset[str] = frozenset()
) -> FoundWeights:
    """Rename and convert every tensor of `checkpoint`, as `from_pretrained` would, but those for the tensors `unused`,
    which the class has and `model` has not."""
    state = model.state_dict()
    known = {**dict.fromkeys(unused, torch.empty(0)), **state}
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix

    traced: dict[str, TracedTensor] = {}
    conversions: dict[str, WeightConverter] = {}
    unexpected: list[str] = []
    # The order is Transformers': experts are joined in it, and some renamings depend on it.
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name not in state:
            if name not in unused:
                unexpected.append(name)
            continue
        if checkpoint.tensors[key].fault:
            raise CheckpointError(checkpoint.tensors[key].fault)
        stand_in = trace(checkpoint.tensors[key], dtypes.of(name, state[name]))
        if pattern is None:
            traced[name] = stand_in
        else:
            if name not in conversions:
                conversions[name] = deepcopy(by_pattern[pattern])
            conversions[name].add_tensor(name, key, pattern, cast(Any, stand_in))
    for name, conversion in conversions.items():
        for target, converted in _convert(model, name, conversion).items():
            if target in state:
                traced[target] = converted
            elif target not in unused:
                unexpected.append(target)
    for name, found in traced.items():
        _check(checkpoint, name, found, state[name])
    return FoundWeights(traced, tuple(_without_known(model, unexpected)))


def _convert(model: PreTrainedModel, name: str, conversion: WeightConverter) -> dict[str, TracedTensor]:
    operations = " + ".join(repr(operation) for operation in conversion.operations)
    collected: list[Any] = [tensor for tensors in conversion.collected_tensors.values() for tensor in tensors]
    source = collected[0].parts[0].stored.name
    try:
        results = conversion.convert(name, model=model, config=model.config)
    except UntraceableError as error:
        raise CheckpointError(
            f"{name}: the weight conversion {operations} of {source} is not supported ({error}): load "
            "the model with "
            "Transformers and save_pretrained(..., save_original_format=False) it into a new directory"
        ) from error
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{name}: the weight conversion {operations} of {source} and {len(collected) - 1} more "
            "tensors failed "
            f"({error}): the checkpoint does not fit its config.json, download both again"
        ) from error
    found = {}
    for target, result in results.items():
        converted = result[0] if isinstance(result, list) else result
        if not isinstance(converted, TracedTensor):
            raise CheckpointError(f"{name}: the weight conversion {operations} of {source} is not supported")
        found[target] = converted
    return found


def _check(checkpoint: Checkpoint, name: str, found: TracedTensor, wanted: torch.Tensor) -> None:
    stored = found.parts[0].stored if found.parts else None
    where = f"{checkpoint.files[stored.file]}, tensor {stored.name}" if stored else name
    if found.shape != wanted.shape:
        count = f" ({len(found.parts)} stored tensors joined)" if len(found.parts) > 1 else ""
        raise CheckpointError(
            f"{where}: {name} has shape {list(found.shape)} in the checkpoint{count} and {list(wanted.shape)} in the "
            f"model: {checkpoint.misfit}"
        )
    target = dtype_name(found.dtype)
    if target not in ITEM_BYTES:
        raise CheckpointError(f"{where}: the model wants {name} in {target}, which is not supported")
    for part in found.parts:
        source = part.stored.dtype
        if source != target and not (source in _FLOATS and target in _FLOATS):
            raise CheckpointError(
                f"{where}: {name} is stored as {source} and the model wants {target}: only casts between "
                f"{', '.join(_FLOATS)} are supported, so save the model again in one of them"
            )
    if sum(math.prod(part.shape) for part in found.parts) != math.prod(wanted.shape):
        raise CheckpointError(f"{where}: the stored tensors do not fill all of {name}: download the checkpoint again")


def _without_known(model: PreTrainedModel, unexpected: Iterable[str]) -> list[str]:
    """Leave out what the model class declares harmless, buffers that older Transformers stored, and weights of parts
    that could not be made."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ()) | {
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    }
    ignored = re.compile("|".join(f"({pattern})" for pattern in sorted(patterns)))
    absent = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, Absent))
    return [
        name
        for name in unexpected
        if not ignored.search(name)
        and not f"{model.base_model_prefix}.{name}".startswith(absent)
        and not name.startswith(absent)
    ]

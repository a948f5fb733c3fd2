"""Proof that our path and Transformers' own give the same logits for a model class that the tests do not cover.

A tiny model of the class with random weights runs ragged sequences both ways: Transformers' forward over each whole
sequence alone, and ours in packed micro-batches, interleaved layer by layer, with prompts in two chunks and then single
tokens.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import greenlet
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexgen_lite.workers.compute.attention_call import AttentionCall, ModelGreenlet
from flexgen_lite.workers.compute.latents import in_latent_space
from flexgen_lite.workers.compute.mixers import NOTHING, Key, Mixer, StateSpan
from flexgen_lite.workers.compute.model_inputs import model_inputs
from flexgen_lite.workers.compute.prefill_attention import causal_attention
from flexgen_lite.workers.compute.tiny_config import tiny_config
from flexgen_lite.workers.compute.trial import find_text_path
from flexgen_lite.workers.model import builder as model_builder
from flexgen_lite.workers.serve import UserError, first_line

TESTED_TYPES: frozenset[str] = frozenset(
    {
        "opt", "gpt2", "gpt_neox", "gpt_bigcode", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral",
        "gemma2", "gemma3_text", "phi", "phi3", "gpt_oss", "olmo2", "starcoder2", "cohere", "granite", "deepseek_v3",
        "deepseek_v32", "llama4_text", "diffllama", "longcat_flash", "gemma3", "gemma4", "gemma4_text", "gemma3n_text",
        "qwen3_vl", "mllama", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "lfm2", "lfm2_moe", "lfm3", "bamba",
        "nemotron_h", "granitemoehybrid", "jamba", "falcon_h1", "kimi_linear", "bailing_hybrid", "olmo_hybrid",
        "zamba2", "mamba", "mamba2", "falcon_mamba", "qwen3_5", "qwen3_5_moe", "minimax",
        "zaya", "zamba", "recurrent_gemma",
    }
)  # fmt: skip
TOLERANCE = 2e-3  # of the largest logit; a wrong mask or position is off by far more
LENGTHS = ((11, 3), (5, 17))  # prompt lengths of two micro-batches
STEPS = 4


def prove(config: PreTrainedConfig) -> bool:
    """Whether latents may be kept instead of keys and values, where the class makes these of latents.

    Raises UserError where the class's answers differ either way, or no tiny model of it can be made.
    """
    try:
        _prove(config, keeps_latents=True)
    except UserError:
        if "kv_lora_rank" not in str(config.to_dict()):
            raise
        _prove(config, keeps_latents=False)
        return False
    return True


def _prove(config: PreTrainedConfig, keeps_latents: bool) -> None:
    kind = f"{config.model_type} is not among the tested model types, and"
    try:
        tiny, ours = tiny_model(config)
    except UserError:
        raise
    except Exception as reason:  # of many kinds: a config class checks what it is given
        raise UserError(
            f"{kind} the tiny model that was to prove it cannot be made from its config "
            f"({type(reason).__name__}: {first_line(reason)}): it cannot be served"
        ) from reason
    try:
        find_text_path(ours, keeps_latents)
        theirs = model_builder.build(tiny, torch.float32, "eager")
        _fill(ours, theirs)
        error = largest_error(theirs, ours)
    except UserError:
        raise
    except Exception as reason:  # whatever a class unknown to us may raise: it is not proven, so it is refused
        raise UserError(
            f"{kind} a tiny model of it fails here ({type(reason).__name__}: {first_line(reason)}): it cannot be served"
        ) from reason
    if error > TOLERANCE:
        raise UserError(
            f"{kind} a tiny model of it gives other logits here than in "
            f"Transformers (relative error {error:.1g}, {TOLERANCE:.1g} allowed): it cannot be served"
        )


def tiny_model(config: PreTrainedConfig) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """A tiny model of `config`, without weights, and its own config. Raises whatever its class does."""
    first: Exception | None = None
    for keeps_vocabulary, of_each_kind in ((False, 1), (True, 1), (False, 2)):
        try:
            tiny = tiny_config(config, keeps_vocabulary, of_each_kind)
            return tiny, model_builder.build(copy.deepcopy(tiny), torch.float32)  # each keeps its own, and changes it
        except UserError:
            raise
        except Exception as error:  # of many kinds: a config class checks what it is given
            first = first or error
    assert first is not None
    raise first


def _fill(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """The same random weights in both, where ours has any. What a text does not need has NaNs in theirs, which shows if
    it does need it."""
    without_weights(theirs)
    generator = torch.Generator().manual_seed(0)
    others = theirs.state_dict(keep_vars=True)
    for name, tensor in ours.state_dict(keep_vars=True).items():
        if is_computed(tensor, others.get(name)):
            continue
        value = torch.randn(tensor.shape, generator=generator) * 0.1 + 1
        if tensor.dim() > 1:
            value = torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
        if tensor.is_floating_point():
            for model in (ours, theirs):
                _set(model, name, value, isinstance(tensor, nn.Parameter))
    for model in (ours, theirs):
        model.tie_weights()


def is_computed(tensor: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether it is a buffer with values that the class makes of its config: the same in both models, and several."""
    if isinstance(tensor, nn.Parameter) or other is None or tensor.shape != other.shape or tensor.numel() < 2:
        return False
    return torch.equal(tensor, other) and bool((tensor != tensor.flatten()[0]).any())


def without_weights(model: PreTrainedModel) -> None:
    """NaNs in place of parameters on the meta device, in memory for one of them."""
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and value.is_meta:
                nan = torch.full((), float("nan"), dtype=value.dtype)
                module._parameters[name] = nn.Parameter(nan.expand(value.shape), requires_grad=False)


def _set(model: PreTrainedModel, name: str, value: torch.Tensor, is_parameter: bool) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if is_parameter:
        module._parameters[attribute] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[attribute] = value


class _PackedForward(ModelGreenlet):
    """One pass of a micro-batch: the given new tokens of each sequence behind those whose K and V are kept."""

    def __init__(
        self, model: PreTrainedModel, new_tokens: list[torch.Tensor], kept: list[dict[Any, Any]], starts: list[int]
    ) -> None:
        super().__init__(self._forward)
        self._model, self._new_tokens, self._kept, self._starts = model, new_tokens, kept, starts
        self._has_past = starts[0] > 0
        self._layer = -1
        self.logits: list[torch.Tensor] = []

    def _forward(self) -> None:
        starts, new_tokens = self._starts, self._new_tokens
        positions = [start + i for start, new in zip(starts, new_tokens, strict=True) for i in range(len(new))]
        inputs = model_inputs(self._model, torch.cat(self._new_tokens)[None], torch.tensor([positions]))
        output = self._model(**inputs)
        self.logits = list(output.logits[0].split([len(new) for new in self._new_tokens]))

    def mix(self, mixer: Mixer, rows_1TD: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        spans, row = [], 0
        for number, new in enumerate(self._new_tokens):
            spans.append(StateSpan(row, len(new), number if self._has_past else NOTHING, number))
            row += len(new)
        output = mixer.run(rows_1TD, spans, self, args, kwargs)
        self.stop()
        return output

    def stop(self) -> None:
        self._layer += 1
        assert isinstance(self.parent, greenlet.greenlet)
        self.parent.switch()

    def get(self, key: Key, places: Sequence[int]) -> torch.Tensor:
        return torch.stack([self._kept[place][key] for place in places])

    def put(self, key: Key, places: Sequence[int], values: torch.Tensor) -> None:
        for place, value in zip(places, values, strict=True):
            self._kept[place][key] = value.clone()

    def attend(self, call: AttentionCall) -> torch.Tensor:
        self._layer += 1
        layer = self._layer
        assert isinstance(self.parent, greenlet.greenlet)
        self.parent.switch()  # another micro-batch runs now
        latents, head_dim = call.latents, call.query_BHTD.shape[3]
        if latents is not None:
            call = in_latent_space(call)
        outputs, row = [], 0
        for new, kept in zip(self._new_tokens, self._kept, strict=True):
            rows = slice(row, row + len(new))
            keys_GSD, values_GSE = call.key_BGTD[0, :, rows], call.value_BGTE[0, :, rows]
            if layer in kept:
                keys_GSD = torch.cat([kept[layer][0], keys_GSD], dim=1)
                values_GSE = torch.cat([kept[layer][1], values_GSE], dim=1)
            kept[layer] = (keys_GSD, values_GSE)
            outputs.append(causal_attention(call, rows, keys_GSD, values_GSE))
            row += len(new)
        out_THE = torch.cat(outputs)
        return (out_THE if latents is None else latents.expand_output(out_THE, head_dim))[None]


def _passed(length: int, step: int) -> int:
    """Tokens of a sequence before a step, `length` of which are its prompt."""
    return (0, length // 2 + 1)[step] if step < 2 else length + step - 2


def largest_error(theirs: PreTrainedModel, ours: PreTrainedModel) -> float:
    """Largest difference of the logits of all tokens, relative to the largest logit."""
    generator = torch.Generator().manual_seed(1)
    vocab = model_builder.text_config(theirs.config).vocab_size
    batches = [[torch.randint(vocab, (length + STEPS,), generator=generator) for length in group] for group in LENGTHS]
    found: dict[tuple[int, int], list[torch.Tensor]] = defaultdict(list)
    kept: list[list[dict[Any, Any]]] = [[{} for _ in group] for group in LENGTHS]
    with torch.no_grad():
        for step in range(STEPS + 2):
            forwards = []
            for k, (group, tokens) in enumerate(zip(LENGTHS, batches, strict=True)):
                begins, ends = [_passed(length, step) for length in group], [_passed(n, step + 1) for n in group]
                new = [t[begin:end] for t, begin, end in zip(tokens, begins, ends, strict=True)]
                forwards.append(_PackedForward(ours, new, kept[k], begins))
            while not all(forward.dead for forward in forwards):
                for forward in forwards:
                    if not forward.dead:
                        forward.switch()
            for k, forward in enumerate(forwards):
                for i, logits in enumerate(forward.logits):
                    found[k, i].append(logits)
        error, largest = 0.0, 1e-9
        for (k, i), parts in found.items():
            expected = theirs(input_ids=batches[k][i][None], use_cache=False).logits[0]
            error = max(error, float((torch.cat(parts) - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
    return error / largest if error == error else float("inf")  # a NaN is no proof

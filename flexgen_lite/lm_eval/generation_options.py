"""What a task's generation arguments and the model's generation_config.json ask for, as `hf` understands them.

`hf` hands what it does not know to Transformers' `generate`: dozens of options, which hold over the model's own
generation_config.json, which holds over Transformers' defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from transformers import GenerationConfig

DEFAULT_TOP_K = 50
"""Transformers' own, where nobody says otherwise."""

HONOURED = frozenset({
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_length", "max_new_tokens",
    "min_length", "min_new_tokens", "eos_token_id", "seed",
})  # fmt: skip
NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "constraints": (), "force_words_ids": (),
    "penalty_alpha": (0,), "dola_layers": (), "use_mtp": (False,), "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "bad_words_ids": (), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "sequence_bias": (), "token_healing": (False,), "guidance_scale": (1,), "watermarking_config": (), "max_time": (),
    "stop_strings": (), "return_dict_in_generate": (False,),
    "cache_implementation": ("dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window"),
}  # fmt: skip
"""Options of `generate` that the engine has not, and their values, beside None, that change no token."""
NEUTRAL_SAMPLING: dict[str, tuple[object, ...]] = {
    "typical_p": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": (),
}  # fmt: skip
"""The same, where tokens are drawn; greedy decoding has no use for them."""
WITHOUT_EFFECT = frozenset({
    "early_stopping", "length_penalty", "diversity_penalty", "renormalize_logits", "remove_invalid_values",
    "bos_token_id", "decoder_start_token_id", "low_memory", "cache_config", "max_cache_len", "prefill_chunk_size",
    "compile_config", "disable_compile", "continuous_batching_config", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
    "max_matching_ngram_size", "speculation_type", "transformers_version",
})  # fmt: skip
"""Of beams, caches, compilers and draft models: without those, whatever the value, the tokens are the same."""
_GIVEN_BY_HF = frozenset({"pad_token_id", "use_cache"})  # whatever the model says; a task may not
_WHOLE_NUMBERS = ("max_length", "min_length", "min_new_tokens")


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """
    Attributes:
        until: strings that end a text; the end of sequence's is the last.
        max_gen_toks: room that is left for the answer where a prompt is cut.
        max_new_tokens: most tokens of the answer, where they are counted without the prompt.
        max_length: where they are counted with it.
        min_new_tokens: an end of sequence comes no earlier; None counts with the prompt, in `min_length`.
        end_ids: tokens that end a sequence.
        sampling: of SamplingParams.
        seed: of a task that gives one.
    """

    until: tuple[str, ...]
    max_gen_toks: int
    max_new_tokens: int
    max_length: int | None
    min_new_tokens: int | None
    min_length: int
    end_ids: tuple[int, ...]
    sampling: dict[str, Any]
    seed: int | None

    @property
    def is_sampled(self) -> bool:
        return bool(self.sampling["temperature"])

    def most_tokens(self, num_prompt_tokens: int) -> int:
        """
        Raises:
            ValueError: the prompt leaves none.
        """
        most = self.max_new_tokens if self.max_length is None else self.max_length - num_prompt_tokens
        if most < 1:
            counted = "" if self.max_length is None else f", max_length={self.max_length} with it"
            raise ValueError(f"a prompt of {num_prompt_tokens} tokens leaves {most} to generate{counted}: allow more")
        return most

    def least_tokens(self, num_prompt_tokens: int) -> int:
        given = self.min_new_tokens
        least = self.min_length - num_prompt_tokens if given is None else given
        return min(max(0, least), self.most_tokens(num_prompt_tokens))


def read_model_defaults(directory: str, vocab_size: int) -> dict[str, Any]:
    """What the model's generation_config.json says, or in its absence its config.json."""
    try:
        found = GenerationConfig.from_pretrained(directory)
    except OSError:
        found = GenerationConfig.from_pretrained(directory, config_file_name="config.json", _from_model_config=True)
    known = vars(GenerationConfig())  # what else a file has, `generate` does not read
    values = found.to_dict()
    kept = {name: value for name, value in values.items() if name in known and value is not None and name[0] != "_"}
    if "eos_token_id" in kept:  # some models name tokens that they do not have
        kept["eos_token_id"] = [token for token in _ids(kept["eos_token_id"]) if 0 <= token < vocab_size]
    return kept


def read_options(
    given: Mapping[str, Any], model_defaults: Mapping[str, Any], max_gen_toks: int, end_text: str | None
) -> GenerationOptions:
    """
    Args:
        given: of the task.
        model_defaults: of `read_model_defaults`.
        max_gen_toks: where the task does not say.
        end_text: of the end of sequence.

    Raises:
        ValueError: an option is unknown, has an impossible value, or asks for what the engine does not do.
    """
    try:
        task = dict(normalize_gen_kwargs(dict(given), max_gen_toks))
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation options {dict(given)}: {error}") from error
    until = handle_stop_sequences(task.pop("until"), end_text)
    for string in until:
        if not isinstance(string, str):
            raise ValueError(f"until={given['until']!r} is not allowed: give a string or a list of strings")
    most = task.pop("max_gen_toks")
    temperature = _temperature(task)
    merged = {"top_k": DEFAULT_TOP_K, **model_defaults, **task}
    _refuse("generation option", task, temperature > 0)
    of_the_model = {name: value for name, value in model_defaults.items() if name not in (*task, *_GIVEN_BY_HF)}
    _refuse("the model's generation_config.json:", of_the_model, temperature > 0)
    sampling = {"temperature": temperature}
    names = ("top_k", "top_p", "min_p", "repetition_penalty") if temperature else ("repetition_penalty",)
    sampling |= {name: merged[name] for name in names if merged.get(name) is not None}
    return GenerationOptions(
        tuple(until),
        most,
        model_defaults.get("max_new_tokens", most),  # it goes before the length that `hf` gives
        None if "max_new_tokens" in model_defaults else task.get("max_length"),
        merged.get("min_new_tokens"),
        merged.get("min_length") or 0,
        _ids(merged.get("eos_token_id")),
        sampling,
        merged.get("seed"),
    )


def _temperature(task: Mapping[str, Any]) -> float:
    """0 where the most likely token is taken.

    Raises:
        ValueError: tokens are to be drawn, but not at what temperature.
    """
    do_sample, temperature = task["do_sample"], task.get("temperature", 0.0)
    if type(do_sample) is not bool:
        raise ValueError(f"do_sample={do_sample!r} is not allowed: give True or False")
    if not do_sample:
        return 0.0
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise ValueError(f"do_sample=True with temperature={temperature!r} is not allowed: give one above 0")
    return float(temperature)


def _refuse(whose: str, options: Mapping[str, Any], is_sampled: bool) -> None:
    for name, value in options.items():
        if name in _WHOLE_NUMBERS and value is not None and type(value) is not int:
            raise ValueError(f"{whose} {name}={value!r} is not allowed: give a whole number")
        if name in HONOURED or name in WITHOUT_EFFECT:
            continue
        if name in NEUTRAL_SAMPLING and not is_sampled:
            continue
        neutral = NEUTRAL.get(name, NEUTRAL_SAMPLING.get(name))
        if neutral is None:
            raise ValueError(f"{whose} {name}={value!r} is refused: docs/evaluation.md has those that there are")
        if value is not None and value not in neutral:
            raise ValueError(f"{whose} {name}={value!r} is refused: the engine does not do that")


def _ids(given: int | list[int] | None) -> tuple[int, ...]:
    if given is None:
        return ()
    return tuple(given) if isinstance(given, list | tuple) else (int(given),)

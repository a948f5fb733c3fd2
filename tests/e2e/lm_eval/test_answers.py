"""Answers and conversations of the harness' model beside those of its own `hf` one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flexgen_lite.lm_eval.model import FlexGenLiteLM
from tests.lm_eval_pair import (
    ALIASES,
    CHAT,
    CONTEXTS,
    PAIRS,
    TEMPLATE,
    Engine,
    Make,
    asked,
    generate,
    hf,
)
from tests.tiny_tokenizers import IM_END, KINDS, TEXT

NUM_OF_TEXT = 7  # of the options: what they do depends on the tokenizer
OPTIONS: list[dict[str, Any]] = [
    {},
    {"until": "<|im_end|>"},
    {"until": ["<|im_end|>", "\n\n"]},
    {"until": ["x", "5", "the", " a"]},
    {"until": ["</s>"], "max_gen_toks": 40},
    {"until": [""]},
    {"until": ["x", ""]},
    {"max_gen_toks": 50},
    {"max_new_tokens": 3},
    {"max_tokens": 4, "max_completion_tokens": 9},
    {"max_gen_toks": 2, "max_new_tokens": 30},
    {"max_gen_toks": 8, "max_length": 40},
    {"repetition_penalty": 1.5},
    {"min_new_tokens": 9, "until": ["e"]},
    {"min_length": 30},
    {"min_new_tokens": 30, "max_gen_toks": 12},
    {"eos_token_id": [IM_END, 40, 41, 42, 43, 44, 45]},
    {"eos_token_id": IM_END, "min_new_tokens": 6},
    {"do_sample": False, "temperature": 0.7, "top_p": 0.5, "typical_p": 0.5},
    {"temperature": -1.0},
    {"temperature": 0.5, "top_k": 1},
    {"do_sample": True, "temperature": 1.5, "top_p": 1e-6},
    {"num_beams": 1, "no_repeat_ngram_size": 0, "length_penalty": 2.0, "bad_words_ids": None},
]


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("kind", KINDS)
def test_answers(make: Make, engine: Engine, kind: str) -> None:
    model = make(kind, "bos")
    mine, theirs = FlexGenLiteLM(str(model), engine(kind)), hf(model)
    for options in OPTIONS if kind == "bytes" else OPTIONS[:NUM_OF_TEXT]:
        options = {"max_gen_toks": 16, **options} if not {*options} & ALIASES else options
        assert generate(mine, CONTEXTS[2:4], **options) == generate(theirs, CONTEXTS[2:4], **options), options


@pytest.mark.parametrize("kind", KINDS)
def test_strings_that_end_an_answer(make: Make, engine: Engine, kind: str) -> None:
    """All that occur in some answers: within a token, over many, where a special token was, at the very beginning."""
    model = make(kind, "nothing")
    mine, theirs = FlexGenLiteLM(str(model), engine(kind)), hf(model)
    requests = []
    for context in CONTEXTS[:4]:
        ids = theirs.model.generate(
            torch.tensor([theirs.tokenizer.encode(context)]), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        text = theirs.tokenizer.decode(ids[0, -24:])
        cuts = [(start, start + size) for start in (0, 7, 15) for size in (1, 4, 11)]
        requests += [(context, {"until": [text[first:last]], "max_gen_toks": 30}) for first, last in cuts]
        requests += [(context, {"until": [text[6:8], text[3:16], "<|im_end|>"], "max_gen_toks": 30})]
    found, wanted = (lm.generate_until(asked("generate_until", requests), disable_tqdm=True) for lm in (mine, theirs))
    for request, mine_, other in zip(requests, found, wanted, strict=True):
        assert mine_ == other, request


@pytest.mark.parametrize("think_end", ["<|im_end|>", IM_END, str(IM_END), "e", "\n"])
def test_answers_begin_behind_the_thinking(make: Make, engine: Engine, think_end: str | int) -> None:
    model = make("bytes", "bos")
    mine = FlexGenLiteLM(str(model), engine("bytes"), think_end_token=think_end)
    theirs = hf(model, think_end_token=think_end)
    for until in ([], ["t"], ["x y z", "o"]):
        options = {"until": until, "max_gen_toks": 24}
        assert generate(mine, CONTEXTS, **options) == generate(theirs, CONTEXTS, **options)


@pytest.mark.parametrize(
    ("tokenizer", "arguments"),
    [
        ({"bos_token": None}, {}),
        ({"eos_token": "<|im_end|>"}, {}),
        ({}, {"add_bos_token": True}),
        ({"model_max_length": 12}, {"truncation": True}),
        ({"model_max_length": 12, "truncation_side": "left"}, {"truncation": True, "add_bos_token": True}),
        ({"clean_up_tokenization_spaces": True}, {}),
    ],
)
def test_prompts(make: Make, engine: Engine, tokenizer: dict[str, Any], arguments: dict[str, Any]) -> None:
    for around in ("nothing", "both"):
        model = make("bytes", around, **tokenizer)
        mine, theirs = FlexGenLiteLM(str(model), engine("bytes"), **arguments), hf(model, **arguments)
        contexts = [*CONTEXTS, "<s>The quick", "</s>The quick", "The quick<|im_end|>", TEXT]
        assert generate(mine, contexts, max_gen_toks=16) == generate(theirs, contexts, max_gen_toks=16)


@pytest.mark.parametrize(
    "generation",
    [
        {},
        {"eos_token_id": None},
        {"eos_token_id": [IM_END, 2, 99999]},
        {"eos_token_id": 2, "repetition_penalty": 1.4, "do_sample": True, "temperature": 0.6, "top_k": 3},
        {"eos_token_id": 2, "max_new_tokens": 5},
        {"eos_token_id": 2, "max_length": 7, "min_new_tokens": 12, "unknown_to_transformers": 7},
        {"eos_token_id": IM_END, "min_length": 40, "num_beams": 1, "cache_implementation": "hybrid"},
    ],
)
@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
def test_what_the_model_says_of_generation(make: Make, engine: Engine, generation: dict[str, Any]) -> None:
    model = make("bytes", "bos", generation)
    mine, theirs = FlexGenLiteLM(str(model), engine("bytes")), hf(model)
    for options in ({}, {"repetition_penalty": 1.0}, {"until": ["e", "<|im_end|>"]}):
        assert generate(mine, CONTEXTS, max_gen_toks=16, **options) == generate(
            theirs, CONTEXTS, max_gen_toks=16, **options
        )


def test_a_longer_answer_than_the_engine_has_room_for(make: Make, engine: Engine) -> None:
    """`hf` would go beyond the positions that the model was made for."""
    model = make("bytes", "bos", {"eos_token_id": None, "max_new_tokens": 60})
    with pytest.raises(ValueError, match=r"request 0: 60 tokens were to follow a prompt of 48, .* room for 16"):
        generate(FlexGenLiteLM(str(model), engine("bytes")), [TEXT], max_gen_toks=16)


def test_drawn_tokens(make: Make, engine: Engine) -> None:
    """Never another than `hf` could draw. Prompts that are alike get answers of their own, the same in each run."""
    model = make("bytes", "bos", {"eos_token_id": None, "top_k": 4})
    mine, theirs = FlexGenLiteLM(str(model), engine("bytes")), hf(model)
    options = {"do_sample": True, "temperature": 3.0, "max_gen_toks": 1}
    context = CONTEXTS[3]
    tokens = torch.tensor([theirs.tokenizer.encode(context)])
    logits = theirs.model(tokens).logits[0, -1]
    possible = {theirs.tok_decode([token]) for token in logits.topk(4).indices.tolist()}
    torch.manual_seed(5)
    first = generate(mine, [context] * 60, **options)
    assert set(first) == possible
    assert generate(mine, [context] * 60, **options) != first
    torch.manual_seed(5)
    assert generate(mine, [context] * 60, **options) == first
    seeded = generate(mine, [context] * 60, **options, seed=1)
    assert set(seeded) == possible
    assert generate(mine, [context] * 60, **options, seed=1) == seeded


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"enable_thinking": True, "think_end_token": "<|im_end|>"},
        {"enable_thinking": False},
        {"chat_template_args": {"allow_system": True, "enable_thinking": True}, "enable_thinking": False},
        {"chat_template_args": {"allow_system": True}},
    ],
)
def test_conversations(make: Make, engine: Engine, arguments: dict[str, Any]) -> None:
    model = make("bytes", "bos", chat_template=TEMPLATE)
    mine, theirs = FlexGenLiteLM(str(model), engine("bytes"), **arguments), hf(model, **arguments)
    assert mine.chat_template(True) == theirs.chat_template(True) == TEMPLATE
    assert mine.chat_template_args == theirs.chat_template_args
    prompts = []
    for add_generation_prompt in (True, False):
        for chat in (CHAT, CHAT[1:], [*CHAT[1:], {"role": "assistant", "content": "brown"}]):
            found, wanted = (lm.apply_chat_template(chat, add_generation_prompt) for lm in (mine, theirs))
            assert found == wanted
            prompts.append(found)
    assert generate(mine, prompts, max_gen_toks=9) == generate(theirs, prompts, max_gen_toks=9)


def test_thinking_is_for_answers(make: Make, engine: Engine) -> None:
    model = make("bytes", chat_template=TEMPLATE)
    with pytest.raises(ValueError, match="enable_thinking=True needs think_end_token"):
        FlexGenLiteLM(str(model), engine("bytes"), enable_thinking=True)
    mine = FlexGenLiteLM(str(model), engine("bytes"), enable_thinking=True, think_end_token="e")
    with pytest.raises(ValueError, match="enable_thinking=True is for tasks that generate"):
        mine.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)

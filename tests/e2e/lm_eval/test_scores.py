"""Scores of the harness' model beside those of its own `hf` one: the same weights in float32, the same tokenizers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.model import hash_args
from transformers import AutoTokenizer

from flexgen_lite import FlexGenLite
from flexgen_lite.lm_eval.model import FlexGenLiteLM
from tests.lm_eval_pair import (
    CHAT,
    CONTEXTS,
    MAX_LENGTH,
    PAIRS,
    TEXTS,
    TWINS,
    Engine,
    Make,
    asked,
    assert_same_scores,
    generate,
    hf,
)
from tests.real_tokenizers import real_tokenizer
from tests.tiny_models import SMALL_PASSES, make_model
from tests.tiny_tokenizers import AROUND, IM_END


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("around", AROUND)
def test_scores(make: Make, engine: Engine, around: str, add_bos_token: bool | None) -> None:
    model = make("bytes", around)
    mine = FlexGenLiteLM(str(model), engine("bytes"), add_bos_token=add_bos_token)
    assert_same_scores(mine, hf(model, add_bos_token=add_bos_token))


@pytest.mark.parametrize("add_bos_token", [None, True])
@pytest.mark.parametrize("kind", ["pieces", "words"])
def test_scores_with_other_tokenizers(make: Make, engine: Engine, kind: str, add_bos_token: bool | None) -> None:
    """Those that make a beginning of a word, or spaces, of their own."""
    for around in ("nothing", "both"):
        model = make(kind, around)
        mine = FlexGenLiteLM(str(model), engine("bytes"), add_bos_token=add_bos_token)
        texts = [text for text in TEXTS if kind != "words" or text != " \n"]
        assert_same_scores(mine, hf(model, add_bos_token=add_bos_token), texts=texts)


@pytest.mark.parametrize(
    ("tokenizer", "arguments"),
    [
        ({"bos_token": None}, {}),
        ({"bos_token": None}, {"add_bos_token": True}),
        ({"bos_token": None, "eos_token": None}, {"prefix_token_id": 7}),
        ({}, {"prefix_token_id": 7}),
        ({}, {"prefix_token_id": IM_END, "add_bos_token": True}),
        ({"pad_token": "<pad>"}, {"use_fast_tokenizer": False, "trust_remote_code": True, "revision": "other"}),
        ({"add_bos_token": True}, {}),
        ({"add_bos_token": True}, {"add_bos_token": False}),
        ({"model_max_length": 20}, {}),
    ],
)
def test_what_stands_before_a_text(
    make: Make, engine: Engine, tokenizer: dict[str, Any], arguments: dict[str, Any]
) -> None:
    model = make("bytes", "nothing", **tokenizer)
    mine, theirs = FlexGenLiteLM(str(model), engine("bytes"), **arguments), hf(model, **arguments)
    assert (mine.prefix_token_id, mine.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
    assert_same_scores(mine, theirs)


def test_another_tokenizer(make: Make, engine: Engine) -> None:
    """By its directory, within a subfolder, or as an object."""
    other = make("pieces", "bos", bos_token="<s>")
    for given in (str(other), AutoTokenizer.from_pretrained(other)):
        model = make("bytes", "both")
        mine, theirs = FlexGenLiteLM(str(model), engine("bytes"), tokenizer=given), hf(model, tokenizer=given)
        assert mine.tokenizer_name == theirs.tokenizer_name
        assert_same_scores(mine, theirs)
        options = {"until": ["the", "<|im_end|>", "\n", " a"], "max_gen_toks": 25}
        assert generate(mine, CONTEXTS, **options) == generate(theirs, CONTEXTS, **options)
    folder = other.parent
    arguments = {"subfolder": "model", "tokenizer": str(other.parent)}
    assert_same_scores(FlexGenLiteLM(str(folder), engine("bytes"), **arguments), hf(folder, **arguments))


def test_shorter_sequences(make: Make) -> None:
    model = make("bytes", "bos")
    mine, theirs = FlexGenLiteLM(str(model), max_length=23, **SMALL_PASSES), hf(model, max_length=23)
    assert mine.max_length == theirs.max_length == 23
    assert_same_scores(mine, theirs)
    for most in (1, 5, 22):
        assert generate(mine, CONTEXTS, max_gen_toks=most) == generate(theirs, CONTEXTS, max_gen_toks=most)
    with pytest.raises(ValueError, match="23 tokens to generate leave no room for a prompt"):
        generate(mine, CONTEXTS, max_gen_toks=23)
    info, other = mine.get_model_info(), theirs.get_model_info()
    assert info == other
    assert mine._engine is not None
    mine._engine.close()


def test_equally_likely_tokens(make: Make, engine: Engine) -> None:
    """Of two tokens with the same logits greedy decoding takes the first: the second alone is not what it gives."""
    model = make("bytes")
    mine, theirs = FlexGenLiteLM(str(model), engine("bytes")), hf(model)
    contexts = [[number, 5 * number % 300, 40] for number in range(20, 140)]
    tokens = [(None, context, [last]) for context in contexts for last in TWINS]
    found, wanted = (lm._loglikelihood_tokens(tokens, disable_tqdm=True) for lm in (mine, theirs))
    greedy = [is_greedy for _, is_greedy in found]
    assert greedy == [is_greedy for _, is_greedy in wanted]
    assert any(greedy[::2]) and not any(greedy[1::2])


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        (("The quick", ""), "a continuation has no token of its own"),
        (("", ""), "a continuation has no token: "),
        ((" ", "fox"), "a context has no token"),
        (("", "</s>"), "a continuation has no token of its own"),
        (("The", " fox" * 80), "a continuation has .* tokens, a sequence 64 at most"),
    ],
)
def test_pairs_that_hf_cannot_score_either(make: Make, engine: Engine, pair: tuple[str, str], said: str) -> None:
    model = make("bytes", bos_token=None)
    with pytest.raises((AssertionError, IndexError)):
        hf(model).loglikelihood(asked("loglikelihood", [pair]), disable_tqdm=True)
    with pytest.raises(ValueError, match=said):
        FlexGenLiteLM(str(model), engine("bytes")).loglikelihood(asked("loglikelihood", [pair]), disable_tqdm=True)


@pytest.mark.parametrize("name", ["llama2", "qwen3"])
def test_tokenizers_of_real_models(name: str, tmp_path: Path) -> None:
    """Byte fallback and a beginning of sequence; neither, and a chat template with special tokens."""
    model = tmp_path / "model"
    shutil.copytree(real_tokenizer(name), model)
    real = AutoTokenizer.from_pretrained(model)
    ends = {"bos_token_id": real.bos_token_id, "eos_token_id": real.eos_token_id, "pad_token_id": None}
    make_model("llama", model, vocab_size=len(real), num_hidden_layers=2, max_position_embeddings=MAX_LENGTH, **ends)
    with FlexGenLite(model, **SMALL_PASSES) as started:
        for add_bos_token in (True, None):
            mine = FlexGenLiteLM(str(model), started.endpoint, add_bos_token=add_bos_token)
            theirs = hf(model, add_bos_token=add_bos_token)
            assert_same_scores(mine, theirs)
        prompts = [*CONTEXTS, *(mine.apply_chat_template(CHAT[1:]) for _ in range(real.chat_template is not None))]
        for until in ([], real.all_special_tokens[:3], ["a", "\n", "世", " the"]):
            options = {"until": until, "max_gen_toks": 12}
            assert generate(mine, prompts, **options) == generate(theirs, prompts, **options)


def test_what_is_kept(make: Make, engine: Engine) -> None:
    """The same entries as `hf` makes, each as soon as it is known."""
    model = make("bytes", "bos")
    kept = []
    for lm in (FlexGenLiteLM(str(model), engine("bytes")), hf(model)):
        entries: dict[str, Any] = {}

        class Hook:
            def add_partial(self, kind: str, request: Any, result: Any, entries: dict[str, Any] = entries) -> None:
                entries[hash_args(kind, request)] = result

        lm.set_cache_hook(Hook())
        lm.loglikelihood(asked("loglikelihood", PAIRS), disable_tqdm=True)
        lm.loglikelihood_rolling(asked("loglikelihood_rolling", [(text,) for text in TEXTS]), disable_tqdm=True)
        generate(lm, CONTEXTS, until=["e"], max_gen_toks=9)
        kept.append(entries)
        assert (lm.rank, lm.world_size) == (0, 1)
        assert (lm.loglikelihood([]), lm.loglikelihood_rolling([]), lm.generate_until([])) == ([], [], [])
    mine, theirs = kept
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        assert mine[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5, abs=1e-4))

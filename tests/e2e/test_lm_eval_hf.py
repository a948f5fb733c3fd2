"""The harness' model beside its own `hf` one, on the same tiny weights in float32 and with the same tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_lite import FlexGenLite
from flexgen_lite.lm_eval.model import FlexGenLiteLM
from tests.real_tokenizers import real_tokenizer
from tests.tiny_models import SMALL_PASSES, make_model
from tests.tiny_tokenizers import AROUND, IM_END, KINDS, TEXT, VOCAB, make_tokenizer

MAX_LENGTH = 64
TWINS = [600, 601]  # tokens that are always equally likely, and that no tokenizer has
ALIASES = {"max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"}
PAIRS = [
    ("The quick", " brown fox"),
    ("The quick ", "brown fox"),
    ("The quick brown", " fox jumps over"),
    ("Question: what does it do?\n", "Answer: it jumps"),
    ("Question: what does it do?", "\n\nAnswer:"),
    ("", "The quick brown fox"),
    ("", "<s>The quick"),
    ("<s>The quick", " brown"),
    ("</s>The quick", " brown"),
    ("The quick<|im_end|>", " brown fox"),
    ("naïve cafés cost", " 42 € 世界"),
    (TEXT * 2, " Stop at the end"),
    ("The quick", " brown fox"),
]
TEXTS = ["The quick brown fox", TEXT * 3, "<s>The quick", "a", "世界 42 €", " \n", ""]
CONTEXTS = [TEXT[:3], TEXT[10:30], TEXT[45:57], TEXT[60:100], TEXT[90:170]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """`hf` takes many small steps: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Special tokens come often: the model has a taste for them."""
    directory = tmp_path_factory.mktemp("weights")
    make_model("llama", directory, vocab_size=VOCAB, max_position_embeddings=MAX_LENGTH)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[IM_END] *= 2
        for weight, scale in ((model.lm_head.weight, 2), (model.model.embed_tokens.weight, 1)):
            weight[TWINS] = scale * weight[TWINS[0]]
    model.save_pretrained(directory)
    return directory


Make = Callable[..., Path]
Engine = Callable[[str], str]


@pytest.fixture(scope="module")
def make(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a model of the same weights with a tokenizer and a generation_config.json; {} is none."""

    def make(
        kind: str = "bytes", around: str = "nothing", generation: dict[str, Any] | None = None, **more: Any
    ) -> Path:
        directory = tmp_path_factory.mktemp("model") / "model"
        shutil.copytree(weights, directory)
        if generation:
            (directory / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
        elif generation is not None:
            (directory / "generation_config.json").unlink()
        return make_tokenizer(kind, around, directory, **more)

    return make


@pytest.fixture(scope="module")
def engine(make: Make) -> Iterator[Engine]:
    """Gives the endpoint of an engine that has a tokenizer of the kind, which matters where it reads texts."""
    engines: dict[str, FlexGenLite] = {}

    def get(kind: str) -> str:
        if kind not in engines:
            engines[kind] = FlexGenLite(make(kind), **SMALL_PASSES)
        return engines[kind].endpoint

    yield get
    for started in engines.values():
        started.close()


def hf(model: Path, **arguments: Any) -> Any:
    """Without its cache, which mistakes pairs for each other that are the same text, cut at different places."""
    return HFLM(str(model), device="cpu", dtype="float32", batch_size=1, logits_cache=False, **arguments)


def asked(kind: str, requests: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(requests)]


def assert_same_scores(mine: Any, theirs: Any, pairs: list[tuple[str, str]] = PAIRS, texts: list[str] = TEXTS) -> None:
    requests = asked("loglikelihood", pairs)
    found, wanted = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (mine, theirs))
    for pair, (logprob, greedy), (other, other_greedy) in zip(pairs, found, wanted, strict=True):
        assert logprob == pytest.approx(other, rel=1e-5, abs=1e-4), pair
        assert greedy == other_greedy, pair
    rolling = asked("loglikelihood_rolling", [(text,) for text in texts])
    found, wanted = (lm.loglikelihood_rolling(rolling, disable_tqdm=True) for lm in (mine, theirs))
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-4)


def generate(lm: Any, contexts: list[str], **options: Any) -> list[str]:
    requests = asked("generate_until", [(context, options) for context in contexts])
    texts: list[str] = lm.generate_until(requests, disable_tqdm=True)
    return texts


# ------------------------------------------------------------------------------------------------ tokens and scores


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


# ------------------------------------------------------------------------------------------------ generation

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
    for options in OPTIONS:
        options = {"max_gen_toks": 16, **options} if not {*options} & ALIASES else options
        assert generate(mine, CONTEXTS[1:4], **options) == generate(theirs, CONTEXTS[1:4], **options), options


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


# ------------------------------------------------------------------------------------------------ conversations

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and not allow_system %}"
    "{{ raise_exception('no system') }}{% endif %}<s>{{ message.role }}: {{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% if enable_thinking %} hm<|im_end|>{% endif %}{% endif %}"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The quick?"}]


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


@pytest.mark.parametrize("name", ["llama2", "qwen3"])
def test_tokenizers_of_real_models(name: str, tmp_path: Path) -> None:
    """Byte fallback and a beginning of sequence; neither, and a chat template with special tokens."""
    model = tmp_path / "model"
    shutil.copytree(real_tokenizer(name), model)
    real = AutoTokenizer.from_pretrained(model)
    ends = {"bos_token_id": real.bos_token_id, "eos_token_id": real.eos_token_id, "pad_token_id": None}
    make_model("llama", model, vocab_size=len(real), num_hidden_layers=2, max_position_embeddings=MAX_LENGTH, **ends)
    with FlexGenLite(model, **SMALL_PASSES) as started:
        for add_bos_token in (None, True):
            mine = FlexGenLiteLM(str(model), started.endpoint, add_bos_token=add_bos_token)
            assert_same_scores(mine, hf(model, add_bos_token=add_bos_token))
        mine, theirs = FlexGenLiteLM(str(model), started.endpoint), hf(model)
        prompts = [*CONTEXTS, *(mine.apply_chat_template(CHAT[1:]) for _ in range(real.chat_template is not None))]
        for until in ([], real.all_special_tokens[:3], ["a", "\n", "世", " the"]):
            options = {"until": until, "max_gen_toks": 12}
            assert generate(mine, prompts, **options) == generate(theirs, prompts, **options)


# ------------------------------------------------------------------------------------------------ what is kept


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

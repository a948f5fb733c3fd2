"""How likely continuations are, against Transformers' forward of the same tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_lite import Client, EngineError, FlexGenLite
from flexgen_lite.demo.pretrained import MODEL
from flexgen_lite.demo.records import generate, prompt

TEXTS = [prompt(record) for record in generate(3, 4, "held_out")]


@pytest.fixture(scope="module")
def engine() -> Iterator[FlexGenLite]:
    with FlexGenLite(MODEL, dtype="float32", ram="2GiB", attention_threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def logprobs_of() -> object:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    loaded = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()

    def compute(tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = loaded(torch.tensor([tokens])).logits[0]
        return logits.log_softmax(dim=-1)

    compute.tokenizer = tokenizer  # type: ignore[attr-defined]
    return compute


def test_continuations_of_texts(engine: FlexGenLite, logprobs_of) -> None:  # type: ignore[no-untyped-def]
    """With white space at the end of a context, and with none before the continuation."""
    contexts = [TEXTS[0][:20], TEXTS[1][:14] + " ", TEXTS[2][:9], ""]
    continuations = [TEXTS[0][20:30], TEXTS[1][15:22], TEXTS[2][9:], TEXTS[3]]
    scores = engine.score(contexts, continuations)
    encode = logprobs_of.tokenizer.encode
    for context, continuation, score in zip(contexts, continuations, scores, strict=True):
        before, tokens = encode(context.rstrip()), encode(context + continuation)
        table = logprobs_of(tokens)
        rest = tokens[len(before) :]
        found = [float(table[len(before) - 1 + i, token]) for i, token in enumerate(rest)]
        assert score.token_ids == rest
        assert score.token_logprobs == pytest.approx(found, abs=2e-4)
        assert score.logprob == pytest.approx(sum(found), abs=1e-3)
        greedy = table[len(before) - 1 : -1].argmax(dim=-1).tolist()
        assert score.is_greedy == (greedy == rest)


def test_a_continuation_without_a_token_of_its_own_is_refused(engine: FlexGenLite) -> None:
    """It would get the best of all scores."""
    encode = AutoTokenizer.from_pretrained(MODEL).encode
    text = TEXTS[0]
    whole = len(encode(text))
    cut = next(cut for cut in range(len(text) - 1, 0, -1) if len(encode(text[:cut])) == whole and text[cut - 1] != " ")
    with pytest.raises(ValueError, match="has no token of its own"):
        engine.score([text[:cut]], [text[cut:]])


def test_what_is_generated_is_greedy(engine: FlexGenLite) -> None:
    completion = engine.generate(TEXTS[0])
    token_ids = completion.token_ids
    prompt_ids = AutoTokenizer.from_pretrained(MODEL).encode(TEXTS[0])
    likely, unlikely = engine.score([prompt_ids] * 2, [token_ids, token_ids[::-1]])
    assert likely.is_greedy and not unlikely.is_greedy
    assert likely.logprob > unlikely.logprob


def test_whole_texts_from_a_second_client(engine: FlexGenLite, logprobs_of) -> None:  # type: ignore[no-untyped-def]
    with Client(engine.endpoint) as client:
        text, ids = client.loglikelihood([TEXTS[1], [5, 6, 7]])
    tokens = logprobs_of.tokenizer.encode(TEXTS[1])  # begins with the beginning of sequence
    table = logprobs_of(tokens)
    assert text.logprob == pytest.approx(float(table[range(len(tokens) - 1), tokens[1:]].sum()), abs=1e-3)
    assert ids.token_ids == [6, 7]


def test_a_single_pair_is_a_single_score(engine: FlexGenLite) -> None:
    score = engine.score(TEXTS[0][:20], TEXTS[0][20:])
    assert score == engine.score([TEXTS[0][:20]], [TEXTS[0][20:]])[0]
    assert engine.loglikelihood(TEXTS[1]) == engine.loglikelihood([TEXTS[1]])[0]
    assert engine.score("", " x").token_ids


def test_the_longest_that_can_be_scored_is_one_more_than_the_model_takes(engine: FlexGenLite) -> None:
    (score,) = engine.score([[5] * 10], [[6] * 247])
    assert len(score.token_logprobs) == 247
    with pytest.raises(ValueError, match="pair 0: the prompt has 258 tokens, the model takes 256"):
        engine.score([[5] * 10], [[6] * 248])


def test_pairs_that_cannot_be_scored(engine: FlexGenLite) -> None:
    with pytest.raises(ValueError, match="continuation 0 is empty"):
        engine.score(["a"], [""])
    with pytest.raises(ValueError, match="pair 1 is a text and a list of token ids"):
        engine.score(["a", "b"], ["c", [4]])
    with pytest.raises(ValueError, match="context 0 is empty"):
        engine.score([[]], [[4]])
    with pytest.raises(ValueError, match="2 contexts for 1 continuations"):
        engine.score(["a", "b"], ["c"])
    client = Client(engine.endpoint)
    client.close()
    with pytest.raises(EngineError, match="closed"):
        client.score(["a"], ["b"])

"""Penalties, bias, logprobs and stop strings through the whole engine, against Transformers on the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexgen_lite import FlexGenLite, SamplingParams
from flexgen_lite.demo.pretrained import MODEL
from tests.tiny_models import make_model, ragged_prompts

PROMPTS = ragged_prompts(6, longest=30)
FIXED: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[FlexGenLite]:
    with FlexGenLite(model, dtype="float32", max_sequences=8, attention_threads=1) as engine:
        yield engine


def reference(model: Path, prompt: list[int], **options: Any) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens of Transformers' generate, and the logprobs of its own logits, `[12, V]`."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    loaded.generation_config.eos_token_id = None
    output = loaded.generate(
        torch.tensor([prompt]),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits).log_softmax(dim=-1)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        ({"logit_bias": {9: 3.0, 40: -100}}, {"sequence_bias": [[[9], 3.0], [[40], -100.0]]}),
    ],
)
def test_tokens_and_logprobs_are_those_of_transformers(
    engine: FlexGenLite, model: Path, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    found = engine.generate(PROMPTS, SamplingParams(**FIXED, logprobs=4, **ours))
    for prompt, completion in zip(PROMPTS, found, strict=True):
        tokens, logprobs = reference(model, prompt, **theirs)
        assert completion.token_ids == tokens
        assert completion.logprobs is not None and len(completion.logprobs) == 12
        for step, place in enumerate(completion.logprobs):
            ids = logprobs[step].topk(4).indices
            assert place.keys() == {tokens[step], *ids.tolist()}
            for token, entry in place.items():
                assert entry.logprob == pytest.approx(float(logprobs[step, token]), abs=2e-4)
                assert entry.rank == 1 + int((logprobs[step] > logprobs[step, token]).sum())


def test_presence_and_frequency_penalty(engine: FlexGenLite) -> None:
    """The largest ones hardly let a token come twice; negative ones bring it again and again."""
    plain, rare, often = (
        engine.generate(PROMPTS[2], SamplingParams(**{**FIXED, "max_tokens": 40}, **options)).token_ids
        for options in ({}, {"presence_penalty": 2, "frequency_penalty": 2}, {"frequency_penalty": -2})
    )
    assert len(set(rare)) > len(set(plain)) > len(set(often))


def test_options_of_one_request_leave_the_others_alone(engine: FlexGenLite) -> None:
    alone = [engine.generate(prompt, SamplingParams(**FIXED)).token_ids for prompt in PROMPTS]
    odd = SamplingParams(**FIXED, repetition_penalty=1.9, logprobs=20, logit_bias={5: 50})
    mixed = engine.generate(PROMPTS, [odd if i % 2 else SamplingParams(**FIXED) for i in range(len(PROMPTS))])
    for i, completion in enumerate(mixed):
        assert (completion.logprobs is not None) == bool(i % 2)
        assert (completion.token_ids == alone[i]) == (not i % 2)


def test_stop_strings_cut_the_text() -> None:
    prompt = "Record: "
    with FlexGenLite(MODEL, ram="2GiB") as engine:
        free = engine.generate(prompt, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True))
        stop = free.text[len(free.text) // 2 :][:3]
        for include in (False, True):
            params = SamplingParams(
                max_tokens=40,
                temperature=0,
                ignore_eos=True,
                stop=["never comes", stop],
                include_stop_str_in_output=include,
                logprobs=1,
            )
            found = engine.generate(prompt, params)
            assert found.text == free.text[: free.text.index(stop) + len(stop) * include]
            assert found.finish_reason == "stop"
            assert found.token_ids == free.token_ids[: len(found.token_ids)] and len(found.token_ids) < 40
            assert found.logprobs is not None and len(found.logprobs) == len(found.token_ids)
            texts = [place[token].decoded_token for token, place in zip(found.token_ids, found.logprobs, strict=True)]
            assert stop in "".join(texts) and found.text in "".join(texts)
        late = engine.generate(
            prompt, SamplingParams(max_tokens=40, min_tokens=40, temperature=0, ignore_eos=True, stop=stop)
        )
        assert len(late.token_ids) == 40


def prompt_reference(model: Path, prompt: list[int]) -> torch.Tensor:
    """Logprobs by Transformers' own forward, `[T, V]`."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: torch.Tensor = loaded(torch.tensor([prompt])).logits[0]
    return logits.log_softmax(dim=-1)


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama-tied", "gemma2", "cohere", "granite", "deepseek-v3"])
def test_prompt_logprobs_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """In classes that scale or cap their logits too; prompts in chunks, beside sampled sequences."""
    model = make_model(family, tmp_path / "model")
    prompts = [*ragged_prompts(5, longest=70), [5]]
    scored = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, prompt_logprobs=3)
    plain = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=1)
    with FlexGenLite(model, dtype="float32", micro_batches=2, micro_batch_tokens=32, attention_threads=1) as engine:
        found = engine.generate([p for p in prompts for _ in range(2)], [scored, plain] * len(prompts))
    for prompt, completion in zip(prompts, found[::2], strict=True):
        logprobs = prompt_reference(model, prompt)
        assert completion.error is None and completion.prompt_token_ids == prompt
        assert completion.prompt_logprobs is not None and len(completion.prompt_logprobs) == len(prompt)
        assert completion.prompt_logprobs[0] is None
        for at in range(1, len(prompt)):
            place, row = completion.prompt_logprobs[at], logprobs[at - 1]
            assert place is not None
            assert place.keys() == {prompt[at], *row.topk(3).indices.tolist()}
            for token, entry in place.items():
                assert entry.logprob == pytest.approx(float(row[token]), abs=2e-4)
                assert entry.rank == 1 + int((row > row[token]).sum())


def test_prompt_logprobs_of_a_large_vocabulary_come_in_chunks(tmp_path: Path) -> None:
    """256 rows of 50,000 tokens: 51 MB of logits, of which 32 MiB are held at once."""
    model = make_model("llama", tmp_path / "model", vocab_size=50_000, max_position_embeddings=300)
    prompt = [3 + 7 * i for i in range(256)]
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    with FlexGenLite(model, dtype="float32", attention_threads=1) as engine:
        (completion,) = engine.submit([prompt], params).results()
    row = prompt_reference(model, prompt)
    assert completion.outputs[0].token_ids == [] and completion.finish_reason == "length"
    assert completion.prompt_logprobs is not None
    places = zip(prompt[1:], completion.prompt_logprobs[1:], strict=True)
    ours = [place[token].logprob for token, place in places if place is not None]
    theirs = row[range(255), prompt[1:]].tolist()
    assert ours == pytest.approx(theirs, abs=2e-4)


def test_several_answers(engine: FlexGenLite) -> None:
    """As many single requests with the seeds one after the other would give; greedy ones are all the same."""
    params = SamplingParams(max_tokens=8, seed=40, n=5, ignore_eos=True)
    completion = engine.generate(PROMPTS[1], params)
    assert len(completion.outputs) == 5
    for number, output in enumerate(completion.outputs):
        alone = engine.generate(PROMPTS[1], SamplingParams(max_tokens=8, seed=40 + number, ignore_eos=True))
        assert output.token_ids == alone.token_ids
    same = engine.generate(PROMPTS[1], SamplingParams(**FIXED, n=12))
    assert len(same.outputs) == 12
    assert all(output.token_ids == same.token_ids for output in same.outputs)


@pytest.fixture(scope="module")
def demo() -> Iterator[FlexGenLite]:
    with FlexGenLite(MODEL, dtype="float32", ram="2GiB", attention_threads=1) as engine:
        yield engine


@pytest.mark.parametrize(
    "options", [{}, {"stop": ["born", "zzzz"]}, {"logprobs": 2}, {"n": 2, "temperature": 1.0, "seed": 1}]
)
def test_a_stream_makes_up_what_comes_at_once(demo: FlexGenLite, options: dict[str, Any]) -> None:
    params = SamplingParams(**{"max_tokens": 40, "temperature": 0.0, **options})
    prompt = "record: john smith, 3 May 1990 -> "
    whole = demo.generate(prompt, params)
    deltas = list(demo.stream(prompt, params))
    assert len(deltas) > len(whole.outputs[0].token_ids) // 2
    for number, output in enumerate(whole.outputs):
        own = [delta for delta in deltas if delta.number == number]
        assert "".join(delta.text for delta in own) == output.text
        assert [token for delta in own for token in delta.token_ids] == output.token_ids
        assert [delta.finish_reason for delta in own] == [None] * (len(own) - 1) + [output.finish_reason]
        if output.logprobs is not None:
            places = [place for delta in own for place in delta.logprobs or ()]
            assert [list(place) for place in places] == [list(place) for place in output.logprobs]
            for told, expected in zip(places, output.logprobs, strict=True):  # the prompt's beginning was there already
                for token, found in told.items():
                    assert found.logprob == pytest.approx(expected[token].logprob, abs=1e-4)


def test_a_stream_that_is_left_is_cancelled(demo: FlexGenLite) -> None:
    for _ in demo.stream([5, 6], SamplingParams(max_tokens=200, ignore_eos=True)):
        break
    assert demo.generate("a").error is None
    assert demo.status().running == 0
    with pytest.raises(ValueError, match="token id 999"):
        list(demo.stream([999]))

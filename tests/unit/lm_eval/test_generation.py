"""What generation arguments ask for, and where answers end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from flexgen_lite.client.completion import Completion, CompletionOutput
from flexgen_lite.lm_eval import generation_options
from flexgen_lite.lm_eval.generation import Answer, StopStrings
from flexgen_lite.lm_eval.generation_options import GenerationOptions, read_model_defaults, read_options
from tests.tiny_tokenizers import EOS, IM_END, make_tokenizer

DOCS = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make_tokenizer("bytes", "nothing", tmp_path_factory.mktemp("tokenizer")))


def options(defaults: dict[str, Any] | None = None, **given: Any) -> GenerationOptions:
    return read_options(given, defaults or {}, 256, "</s>")


def test_every_option_of_transformers_is_known_and_documented() -> None:
    known = {
        *generation_options.HONOURED, *generation_options.NEUTRAL, *generation_options.NEUTRAL_SAMPLING,
        *generation_options.WITHOUT_EFFECT,
    }  # fmt: skip
    theirs = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert theirs - known == {"pad_token_id", "use_cache"}  # which `hf` gives itself
    for name in (known & theirs) | {"until", "max_gen_toks", "max_tokens", "max_completion_tokens", "seed"}:
        assert f"`{name}`" in DOCS, name


def test_defaults_are_those_of_transformers() -> None:
    greedy, drawn = options(), options(do_sample=True, temperature=0.7)
    assert greedy.sampling == {"temperature": 0.0} and not greedy.is_sampled
    assert drawn.sampling == {"temperature": 0.7, "top_k": 50} and drawn.is_sampled
    assert options(temperature=0.7).is_sampled and not options(temperature=0.7, do_sample=False).is_sampled
    assert options(temperature=1.0, top_k=None).sampling == {"temperature": 1.0}
    assert (greedy.until, greedy.max_new_tokens, greedy.end_ids) == (("</s>",), 256, ())


def test_a_task_goes_before_the_model() -> None:
    of_the_model = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.1}
    assert options(of_the_model).sampling == {"temperature": 0.0, "repetition_penalty": 1.1}
    drawn = options(of_the_model, temperature=1.0, top_p=0.5)
    assert drawn.sampling == {"temperature": 1.0, "top_k": 20, "top_p": 0.5, "repetition_penalty": 1.1}
    assert options(of_the_model, repetition_penalty=None).sampling == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_beams": 4}, "generation option num_beams=4 is refused"),
        ({"stop": ["x"]}, r"generation option stop=\['x'\] is refused"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size=3 is refused"),
        ({"bad_words_ids": [[4]]}, r"bad_words_ids=\[\[4\]\] is refused"),
        ({"suppress_tokens": [4]}, "suppress_tokens"),
        ({"begin_suppress_tokens": [4]}, "begin_suppress_tokens"),
        ({"forced_eos_token_id": 4}, "forced_eos_token_id"),
        ({"forced_bos_token_id": 4}, "forced_bos_token_id"),
        ({"exponential_decay_length_penalty": [3, 1.1]}, "exponential_decay_length_penalty"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
        ({"encoder_repetition_penalty": 1.2}, "encoder_repetition_penalty"),
        ({"sequence_bias": [[[4], 1.0]]}, "sequence_bias"),
        ({"stop_strings": ["x"]}, "stop_strings"),
        ({"max_time": 3}, "max_time"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate"),
        ({"cache_implementation": "quantized"}, "cache_implementation"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"temperature": 1.0, "typical_p": 0.9}, "typical_p"),
        ({"temperature": 1.0, "epsilon_cutoff": 0.1}, "epsilon_cutoff"),
        ({"temperature": 1.0, "eta_cutoff": 0.1}, "eta_cutoff"),
        ({"temperature": 1.0, "top_h": 0.4}, "top_h"),
        ({"pad_token_id": 0}, "pad_token_id"),
        ({"use_cache": False}, "use_cache"),
        ({"repetition_penalt": 1.2}, "repetition_penalt=1.2 is refused"),
        ({"presence_penalty": 1.2}, "presence_penalty=1.2 is refused"),
        ({"logits_processor": []}, "logits_processor"),
        ({"do_sample": True}, "do_sample=True with temperature=0.0 is not allowed"),
        ({"do_sample": True, "temperature": "1.0"}, "temperature='1.0' is not allowed"),
        ({"do_sample": "yes"}, "do_sample='yes' is not allowed"),
        ({"temperature": None}, "generation options .*temperature"),
        ({"max_gen_toks": "many"}, "generation options .*max_gen_toks"),
        ({"until": None}, "until=None is not allowed"),
        ({"until": ["x", 5]}, r"until=\['x', 5\] is not allowed"),
        ({"min_new_tokens": "3"}, "min_new_tokens='3' is not allowed"),
        ({"max_length": 3.5}, "max_length=3.5 is not allowed"),
    ],
)
def test_options_that_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        options(**given)


@pytest.mark.parametrize(
    "given", [{"top_p": 1.5, "temperature": 1.0}, {"top_k": -2, "temperature": 1.0}, {"repetition_penalty": 0}]
)
def test_values_that_are_impossible(tokenizer: Any, given: dict[str, Any]) -> None:
    asked = options(**given)
    with pytest.raises(ValueError, match=f"{next(iter(given))}=.* is not allowed"):
        Answer([5], asked, StopStrings(asked.until, tokenizer)).request()


def test_what_the_model_wants_and_the_engine_does_not(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"no_repeat_ngram_size": 3, "chat_format": "own"}), encoding="utf-8")
    defaults = read_model_defaults(str(tmp_path), 100)
    with pytest.raises(ValueError, match=r"the model's generation_config.json: no_repeat_ngram_size=3 is refused"):
        options(defaults)
    assert options(defaults, no_repeat_ngram_size=0).sampling == {"temperature": 0.0}
    file.write_text(json.dumps({"eos_token_id": [5, 100, -1], "pad_token_id": 3}), encoding="utf-8")
    found = read_model_defaults(str(tmp_path), 100)
    assert (found["eos_token_id"], found["pad_token_id"]) == ([5], 3)


def test_numbers_of_tokens() -> None:
    assert options(max_gen_toks=9).most_tokens(5) == 9
    assert options(max_gen_toks=9, max_length=11).most_tokens(5) == 6
    assert options({"max_new_tokens": 4}, max_gen_toks=9, max_length=11).most_tokens(5) == 4
    assert options(min_length=11).least_tokens(5) == 6
    assert options(min_length=11).least_tokens(15) == 0
    assert options(min_length=11, min_new_tokens=2).least_tokens(5) == 2
    assert options(min_new_tokens=20, max_gen_toks=9).least_tokens(5) == 9
    for given in ({"max_gen_toks": 0}, {"max_length": 5}):
        with pytest.raises(ValueError, match="a prompt of 5 tokens leaves 0 to generate"):
            options(**given).most_tokens(5)


# ------------------------------------------------------------------------------------------------ where answers end


def test_where_a_string_ends_an_answer(tokenizer: Any) -> None:
    encode: Callable[[str], list[int]] = tokenizer.encode
    tokens = [*encode("The quick"), IM_END, *encode(" brown fox jumps"), EOS]
    stops = StopStrings(["fox"], tokenizer)
    end = stops.end(tokens)
    assert end is not None
    assert "fox" in tokenizer.decode(tokens[:end]) and "fox" not in tokenizer.decode(tokens[: end - 1])
    assert StopStrings(["<|im_end|>", "fox"], tokenizer).end(tokens) == len(encode("The quick")) + 1
    assert StopStrings(["</s>"], tokenizer).end(tokens) == len(tokens)
    assert StopStrings(["wolf", "quick<|im_end|>b"], tokenizer).end(tokens) is None
    assert StopStrings([""], tokenizer).end(tokens) == 1


def test_a_string_that_is_spelled_out_ends_nothing(tokenizer: Any) -> None:
    """It is one token; `hf` looks at no more than three."""
    spelled = [token for letter in " jumps" for token in tokenizer.encode(letter)]
    assert len(tokenizer.encode(" jumps")) == 1 and len(spelled) == 6
    assert StopStrings([" jumps"], tokenizer).end(spelled) is None
    assert StopStrings([" jumps"], tokenizer).end([*spelled, *tokenizer.encode(" jumps")]) == 7


def test_a_string_among_bytes_that_are_no_characters(tmp_path: Path) -> None:
    """The text of all tokens does not have it, that of the last few does."""
    pieces = AutoTokenizer.from_pretrained(make_tokenizer("pieces", "nothing", tmp_path))
    tokens = pieces.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in (0x96, *"世世世".encode())])
    assert "世" not in pieces.decode(tokens)
    width = len(pieces.encode("世", add_special_tokens=False)) + 2
    end = StopStrings(["世"], pieces).end(tokens)
    assert end is not None and "世" in pieces.decode(tokens[end - width : end])
    assert all("世" not in pieces.decode(tokens[max(0, n - width) : n]) for n in range(end))


def completion(tokens: list[int], reason: str, error: str | None = None) -> Completion:
    outputs = [] if error else [CompletionOutput("", tokens, reason)]
    return Completion(index=0, prompt="", outputs=outputs, num_prompt_tokens=1, error=error)


def test_an_answer_goes_on_where_the_engine_stopped_too_early(tokenizer: Any) -> None:
    asked = options({"eos_token_id": EOS}, until=[" jumps"], max_gen_toks=20, min_new_tokens=8, temperature=1.0)
    answer = Answer([5, 6], asked, StopStrings(asked.until, tokenizer), seed=7)
    first = answer.request()
    assert first.prompt == [5, 6] and first.params.stop == (" jumps", "</s>")
    assert (first.params.max_tokens, first.params.min_tokens, first.params.seed) == (20, 8, 7)
    assert first.params.stop_token_ids == (EOS,) and first.params.ignore_eos
    spelled = [token for letter in " jumps" for token in tokenizer.encode(letter)]
    assert not answer.take(completion(spelled, "stop"))
    second = answer.request()
    assert second.prompt == [5, 6, *spelled]
    assert (second.params.max_tokens, second.params.min_tokens) == (14, 2) and second.params.seed != 7
    assert answer.take(completion([*tokenizer.encode(" fox"), EOS], "stop"))
    assert answer.text(tokenizer, None) == ""
    assert answer.text(tokenizer, "x") == ""
    assert answer.text(tokenizer, spelled[1]) == "umps fox"


def test_answers_that_fail(tokenizer: Any) -> None:
    asked = options(max_gen_toks=20)
    for found, said in (
        (completion([], "error", "no room"), "no room"),
        (completion([8], "cancelled"), "it was cancelled"),
        (completion([8], "length"), "20 tokens were to follow a prompt of 2, .* have room for 1:"),
    ):
        with pytest.raises(ValueError, match=said):
            Answer([5, 6], asked, StopStrings(asked.until, tokenizer)).take(found)


def test_a_foreign_tokenizer(tokenizer: Any) -> None:
    """The engine does not know its texts; a string that is one token can still end a sequence there."""
    asked = options(until=["<|im_end|>", " jumps", "The quick brown wolf"])
    jumps = tokenizer.encode(" jumps")[0]
    for size, known in ((jumps + 1, {IM_END, EOS, jumps}), (jumps, {IM_END, EOS})):
        params = Answer([5], asked, StopStrings(asked.until, tokenizer, foreign_to=size)).request().params
        assert params.stop == () and set(params.stop_token_ids) == known
    late = options(until=["<|im_end|>"], min_new_tokens=3)
    assert Answer([5], late, StopStrings(late.until, tokenizer, foreign_to=300)).request().params.stop_token_ids == ()


def test_more_and_longer_strings_than_the_engine_takes(tokenizer: Any) -> None:
    strings = ["x" * 1001, *(f"{number} x" for number in range(100, 200))]
    asked = options(until=strings)
    answer = Answer([5], asked, StopStrings(asked.until, tokenizer))
    assert len(answer.request().params.stop) == 64
    assert answer.take(completion(tokenizer.encode("so 199 x"), "length"))
    assert answer.text(tokenizer, None) == "so "

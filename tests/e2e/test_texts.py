"""Texts of a model that answers in bytes, through a real engine."""

from __future__ import annotations

from pathlib import Path

from flexgen_lite import FlexGenLite, SamplingParams
from tests.built_tokenizers import built_tokenizer, ids, save_tokenizer
from tests.tiny_models import make_reciter

LLAMA = built_tokenizer("llama")


def test_a_model_that_answers_in_bytes(tmp_path: Path) -> None:
    answer = [*"龘龗龖龕".encode(), *ids(LLAMA, ".", ".", ".")]
    model = make_reciter(tmp_path / "model", answer, LLAMA._tokenizer.get_vocab_size())
    save_tokenizer("llama", model)
    prompt = ids(LLAMA, ".")
    with FlexGenLite(model, ram="1GiB", dtype="float32") as engine:
        params = SamplingParams(max_tokens=13, temperature=0, stop=["龕"], logprobs=2, ignore_eos=True)
        found = engine.generate(prompt, params)
        assert (found.text, found.finish_reason, found.token_ids) == ("龘龗龖", "stop", answer[:12])
        assert found.outputs[0].text_offsets == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert found.token_bytes[0xE9] == b"\xe9"
        deltas = list(engine.stream(prompt, params))
        assert "".join(delta.text for delta in deltas) == "龘龗龖"
        assert [offset for delta in deltas for offset in delta.text_offsets or ()] == found.outputs[0].text_offsets
        cut = engine.generate(prompt, SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
        assert cut.text == "龘\ufffd"

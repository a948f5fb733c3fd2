"""Models as GGUF through real processes: the tokens of Transformers with the weights that the file stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from flexgen_lite import EngineError, FlexGenLite
from flexgen_lite.workers.model.gguf_config import SPLITS
from tests.e2e.test_quantization import GREEDY, MAX_TOKENS, SETTINGS, answers
from tests.gguf_file import BF16, F16, F32, to_gguf, tokenizer_values
from tests.tiny_models import make_model, ragged_prompts, reference_tokens
from tests.tiny_tokenizers import SPECIAL, VOCAB, make_tokenizer

TALK = [{"role": "user", "content": "Stop at the end."}]
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
MIX = {"": "Q4_K", "v_proj": "Q6_K", "down_proj": "Q5_K", "embed_tokens": "Q6_K", "lm_head": "Q8_0"}


@pytest.mark.parametrize(
    ("family", "kinds", "changes"),
    [
        ("llama", MIX, WIDE),
        ("llama-tied", {"": "Q4_0", "v_proj": "Q4_1", "down_proj": "Q5_0", "embed_tokens": "Q5_1"}, {}),
        ("qwen2", {"": F16, "embed_tokens": F32}, {}),
        ("qwen3-moe", {"": "Q4_0", "down_proj": "Q8_0"}, {"norm_topk_prob": True}),
        ("mixtral", {"": "Q8_0"}, {}),
        ("gemma2", {"": "Q8_0", "embed_tokens": "Q5_0"}, {}),
        ("gemma3", {"": "Q5_0", "embed_tokens": "Q8_0"}, {}),
        ("phi3", {"": BF16, "qkv_proj": "Q8_0"}, {}),
    ],
    ids=str,
)
def test_same_tokens(family: str, kinds: dict[str, str], changes: dict[str, Any], tmp_path: Path) -> None:
    model, prompts = make_model(family, tmp_path / "model", **changes), ragged_prompts(6, longest=40)
    file = to_gguf(model, tmp_path / "model.gguf", kinds)
    expected = reference_tokens(model, prompts, MAX_TOKENS)
    assert answers(file, prompts) == expected
    assert answers(tmp_path, prompts, layer_slots=2, verify_weights=True) == expected, "streamed, of a directory"


def test_quantised_while_loading(tmp_path: Path) -> None:
    """As the directory is that has the same weights; what is quantised already is not quantised again."""
    model, prompts = make_model("llama", tmp_path / "model"), ragged_prompts(4, longest=30)
    file = to_gguf(model, tmp_path / "half.gguf", {"": F16})
    assert answers(file, prompts, quantization="int4") == answers(model, prompts, quantization="int4")
    to_gguf(model, tmp_path / "bits.gguf", {"": "Q8_0"})
    with pytest.raises(EngineError, match=r"bits.gguf is quantised already \(int8\)"):
        answers(tmp_path / "bits.gguf", prompts, quantization="int4")
    with pytest.raises(EngineError, match="holds 2 models as GGUF"):
        answers(tmp_path, prompts)


def test_in_other_orders(tmp_path: Path) -> None:
    """Of values: those of products in bfloat16 are the same as of a directory; those of products in 8 bits run."""
    model, prompts = make_model("llama", tmp_path / "model", torch.bfloat16, **WIDE), ragged_prompts(4, longest=30)
    file = to_gguf(model, tmp_path / "model.gguf", {"": "Q4_0", "v_proj": "Q6_K", "down_proj": "Q5_K"})
    assert answers(file, prompts, dtype="bfloat16") == answers(model, prompts, dtype="bfloat16")
    assert all(len(row) == MAX_TOKENS for row in answers(file, prompts, activations="int8"))


@pytest.mark.skipif(not SPLITS, reason="this Transformers is too old to split text as GGUF files want")
def test_texts_and_chats(tmp_path: Path) -> None:
    """Tokenizer and chat template are in the file."""
    model = make_tokenizer("bytes", "nothing", make_model("qwen2", tmp_path / "model", vocab_size=VOCAB))
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    file = to_gguf(model, tmp_path / "model.gguf", {"": "Q8_0"}, **tokenizer_values(model, SPECIAL, template))
    tokenizer, texts = Tokenizer.from_file(str(model / "tokenizer.json")), ["The quick brown", "naïve café 42"]
    prompts = [tokenizer.encode(text).ids for text in (*texts, f"{TALK[0]['content']}<|im_end|>")]
    with FlexGenLite(file, **SETTINGS) as engine:
        outputs = [*engine.generate(texts, GREEDY), *engine.chat([TALK], GREEDY)]
        expected = engine.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert all(output.text == tokenizer.decode(list(output.token_ids)) for output in outputs)

"""Models as GGUF through real processes: the tokens of Transformers with the weights that the file stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.test_quantization import MAX_TOKENS, answers
from tests.gguf_file import BF16, F16, F32, to_gguf
from tests.tiny_models import make_model, ragged_prompts, reference_tokens

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

"""The whole engine with a GPU as compute device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexgen_lite import FlexGenLite, SamplingParams
from flexgen_lite.engine.zygote import SHARED
from tests.engine_processes import workers_of, zygote_of
from tests.tiny_models import FAMILIES, SMALL_PASSES, make_model, ragged_prompts, reference_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MAX_TOKENS = 10
SETTINGS = {**SMALL_PASSES, "device": "cuda", "ram": "4GiB", "gpu": "2GiB"}


@pytest.mark.parametrize(
    "slots",
    [
        {"layer_slots": 2, "device_slots": 2},
        {"device_slots": 3},
        {},
        {"device_slots": 2, "cpu_projections": "qkv"},
    ],
    ids=["disk", "ram", "gpu", "projections"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_transformers(family: str, slots: dict[str, Any], tmp_path: Path) -> None:
    """Layers come from the disk in every pass, or from RAM, or stay on the GPU; projections are computed on the CPU."""
    model = make_model(family, tmp_path / "model")
    prompts = ragged_prompts(12, longest=70)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    with FlexGenLite(model, **SETTINGS, **slots) as engine:
        completions = engine.generate(prompts, params)
        memory = engine.status().memory
    assert [c.error for c in completions] == [None] * len(prompts)
    assert [list(c.token_ids) for c in completions] == reference_tokens(model, prompts, MAX_TOKENS)
    assert 0 < memory["gpu_peak"] <= 2 << 30


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["opt", "llama", "gemma2", "qwen3-moe", "deepseek-v3"])
def test_logprobs_in_16_bits(family: str, dtype: str, tmp_path: Path) -> None:
    """As near to Transformers' float32 as Transformers itself is in this dtype on this GPU."""
    model = make_model(family, tmp_path / "model")
    prompts = ragged_prompts(8, longest=60)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=0)
    with FlexGenLite(model, **{**SETTINGS, "dtype": dtype}) as engine:
        completions = engine.generate(prompts, params)
    ours, exact, theirs = [], [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.error is None and completion.logprobs is not None
        places = zip(completion.token_ids, completion.logprobs, strict=True)
        ours += [place[token].logprob for token, place in places]
        tokens = [*prompt, *completion.token_ids]
        exact += _logprobs(model, torch.float32, tokens, len(prompt))
        theirs += _logprobs(model, getattr(torch, dtype), tokens, len(prompt))
    error_ours = (torch.tensor(ours) - torch.tensor(exact)).abs()
    error_theirs = (torch.tensor(theirs) - torch.tensor(exact)).abs()
    assert error_ours.mean() <= 1.5 * error_theirs.mean() + 0.01, (error_ours.mean(), error_theirs.mean())
    assert error_ours.max() <= 2 * error_theirs.max() + 0.05, (error_ours.max(), error_theirs.max())


def test_a_lost_worker_is_forked_and_has_a_context_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SHARED, raising=False)
    model = make_model("llama", tmp_path / "model")
    prompts = ragged_prompts(6, longest=30)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True)
    with FlexGenLite(model, **SETTINGS) as engine:
        expected = [completion.token_ids for completion in engine.generate(prompts, params)]
        for _ in range(2):
            workers_of(engine.engine_pid)["compute worker"].kill()
            assert [completion.token_ids for completion in engine.generate(prompts, params)] == expected
            parent = workers_of(engine.engine_pid)["compute worker"].ppid()
            assert parent == zygote_of(engine.engine_pid).pid


def _logprobs(model: Path, dtype: torch.dtype, tokens: list[int], first: int) -> list[float]:
    """Of the tokens from `first` on, by Transformers on the GPU."""
    loaded = _load(model, dtype)
    with torch.no_grad():
        logits = loaded(torch.tensor([tokens], device="cuda")).logits[0].float()
    found = logits.log_softmax(-1)[range(first - 1, len(tokens) - 1), tokens[first:]]
    values: list[float] = found.tolist()
    return values


_loaded: dict[tuple[Path, torch.dtype], Any] = {}


def _load(model: Path, dtype: torch.dtype) -> Any:
    if (model, dtype) not in _loaded:
        # other implementations leave out softcaps
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager")
        _loaded[model, dtype] = loaded.cuda().eval()
    return _loaded[model, dtype]

"""Logits of some rows at a time are those of all rows at once."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from flexgen_lite.workers.compute import attention_call, experts, probe
from flexgen_lite.workers.compute.head import Head
from flexgen_lite.workers.compute.trial import find_text_path
from flexgen_lite.workers.model import builder


@pytest.mark.parametrize("kind", ["llama", "gemma2", "video_llama_3", "granite"])
def test_chunks(kind: str) -> None:
    """VideoLlama3's forward knows of no selection of rows, Gemma 2 and Granite scale their logits."""
    attention_call.register()
    experts.register()
    tiny, ours = probe.tiny_model(AutoConfig.for_model(kind))
    path = find_text_path(ours)
    model = builder.build(tiny, torch.float32, "eager")
    probe._fill(ours, model)
    inputs = {"input_ids": torch.arange(3, 20)[None], "position_ids": torch.arange(17)[None], "use_cache": False}
    wanted_TV = model(**inputs).logits[0].float()
    head = Head(model, builder.decoder_layers(model)[: len(path.layers)])
    chunks = [torch.tensor([3, 16]), torch.tensor([0]), torch.tensor([5, 6, 7])]
    calls: list[torch.Size] = []
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    found = list(head.logits(inputs, chunks))
    assert [shape[1] for shape in calls] == [2, 1, 3], "no more rows than asked for"
    for logits_NV, rows_N in zip(found, chunks, strict=True):
        torch.testing.assert_close(logits_NV, wanted_TV[rows_N])

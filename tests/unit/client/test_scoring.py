"""The logprobs of tokens that are known."""

from __future__ import annotations

import pytest
import torch

from flexgen_lite.workers.compute.sampling import read_scores, score


def test_of_equally_likely_tokens_the_first_alone_is_greedy() -> None:
    """It is the one that greedy decoding draws."""
    logits = torch.tensor([[1.0, 5.0, 5.0, 2.0]] * 4)
    targets = torch.tensor([0, 1, 2, 3])
    expected = logits.log_softmax(dim=-1)[range(4), targets]
    found = list(read_scores(score(logits.clone(), targets, [0] * 4)))
    assert [entry.rank for entry in found] == [4, 1, 2, 3]
    assert [entry.logprob for entry in found] == pytest.approx(expected.tolist())
    assert int(logits[0].argmax()) == 1

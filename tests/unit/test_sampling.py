"""Sampling against Transformers' own processors, and the independence of a draw from its batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from flexgen_lite.messages import NO_TOKEN, Sample
from flexgen_lite.workers.sampling import sample, uniform

VOCAB = 40
DRAWS = 4000
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def how(seed: int, step: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sample:
    return Sample(temperature, top_k, top_p, seed, step, ())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.6), (1.4, 12, 0.8), (1.0, 1, 1.0), (2.0, 0, 0.05)],
)
def test_the_distribution_is_transformers(temperature: float, top_k: int, top_p: float) -> None:
    scores = TemperatureLogitsWarper(temperature)(None, LOGITS[None].clone())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = torch.softmax(scores[0], dim=-1)
    wanted = [how(seed, temperature=temperature, top_k=top_k, top_p=top_p) for seed in range(DRAWS)]
    counts = Counter(sample(LOGITS.repeat(DRAWS, 1), wanted).tolist())
    for token, probability in enumerate(expected.tolist()):
        if probability == 0:
            assert counts[token] == 0
        spread = 5 * (probability * (1 - probability) / DRAWS) ** 0.5 + 1e-3
        assert abs(counts[token] / DRAWS - probability) < spread


def test_a_draw_does_not_depend_on_its_neighbours() -> None:
    rows = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(4))
    wanted = [how(seed=row, step=9, top_p=0.9) for row in range(6)]
    together = sample(rows.clone(), wanted)
    alone = [int(sample(rows[row : row + 1].clone(), wanted[row : row + 1])) for row in range(6)]
    assert together.tolist() == alone


def test_greedy_and_temperatures_that_leave_nothing_to_draw() -> None:
    best = int(LOGITS.argmax())
    for temperature in (0.0, 1e-40, 1e-6, 1e-3):
        assert int(sample(LOGITS[None].clone(), [how(1, temperature=temperature)])) == best


def test_banned_tokens_never_come() -> None:
    best = int(LOGITS.argmax())
    assert int(sample(LOGITS[None].clone(), [Sample(0.0, 0, 1.0, 0, 0, (best,))])) != best


def test_a_row_of_logits_that_are_not_finite_has_no_token() -> None:
    rows = LOGITS.repeat(5, 1)
    rows[1, 7], rows[2, 7], rows[3] = float("nan"), float("inf"), float("-inf")
    ways = [how(0), how(0), how(0, temperature=0.0), how(0), how(0)]
    tokens = sample(rows, ways).tolist()
    assert tokens[1:4] == [NO_TOKEN] * 3
    assert tokens[0] == tokens[4] == int(sample(LOGITS[None].clone(), [how(0)]))


def test_random_numbers_are_uniform_and_repeatable() -> None:
    numbers = [uniform(seed, step) for seed in range(40) for step in range(50)]
    assert numbers == [uniform(seed, step) for seed in range(40) for step in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.03
    assert all(0 <= number < 1 for number in numbers)

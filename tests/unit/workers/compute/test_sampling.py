"""Sampling against Transformers' own processors, and the independence of a draw from its batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flexgen_lite.wire.sampling import NO_TOKEN, Penalties, Sample
from flexgen_lite.workers.compute.sampling import read, uniform
from flexgen_lite.workers.compute.sampling import sample as draw

VOCAB = 40
DRAWS = 4000
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 2


def how(
    seed: int, step: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Sample:
    return Sample(temperature, top_k, top_p, seed, step, min_p=min_p)


def sample(logits_NV: torch.Tensor, samples: list[Sample]) -> torch.Tensor:
    before = logits_NV.clone()
    tokens, _ = read(draw(logits_NV, samples), samples)
    assert torch.equal(before.nan_to_num(), logits_NV.nan_to_num()), "the logits stay as they are"
    return torch.tensor(tokens)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.5, 0, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.6, 0.0),
        (1.4, 12, 0.8, 0.0),
        (1.0, 1, 1.0, 0.0),
        (2.0, 0, 0.05, 0.0),
        (1.0, 0, 1.0, 0.2),
        (1.5, 10, 0.9, 0.1),
        (1.0, 0, 0.8, 0.3),
        (1.0, 0, 1.0, 1.0),
    ],
)
def test_the_distribution_is_transformers(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    scores = TemperatureLogitsWarper(temperature)(None, LOGITS[None].clone())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    expected = torch.softmax(scores[0], dim=-1)
    wanted = [how(seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p) for seed in range(DRAWS)]
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


PROMPT, GENERATED = (3, 9, 9, 14), (21, 3, 30, 21, 21)


def greedy(**options: Any) -> Sample:
    return Sample(0.0, 0, 1.0, 0, len(GENERATED), **options)


def order(logits_V: torch.Tensor, sampled: Sample) -> list[int]:
    """All tokens, the best first, as greedy draws tell: each one drawn is banned from then on."""
    found: list[int] = []
    while len(found) < VOCAB - 1:
        banned = replace(sampled, banned=(*sampled.banned, *found))
        found.append(int(sample(logits_V[None].clone(), [banned])))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_bias_and_repetition_penalty_are_transformers(seed: int) -> None:
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    bias = {5: 1.5, 21: -0.7, 3: 2.0}
    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]),
            RepetitionPenaltyLogitsProcessor(1.3),
        ]
    )
    expected = processors(torch.tensor([[*PROMPT, *GENERATED]]), logits_V[None].clone())[0]
    penalties = Penalties(1.3, 0.0, 0.0, tuple(sorted(set(PROMPT))), GENERATED)
    found = order(logits_V, greedy(bias=tuple(bias.items()), penalties=penalties))
    assert found == expected.argsort(descending=True).tolist()[: VOCAB - 1]


def test_presence_and_frequency_are_taken_off_what_was_generated() -> None:
    expected = LOGITS.clone()
    for token in set(GENERATED):
        expected[token] -= 0.4 + 0.7 * GENERATED.count(token)
    found = order(LOGITS, greedy(penalties=Penalties(1.0, 0.4, 0.7, (), GENERATED)))
    assert found == expected.argsort(descending=True).tolist()[: VOCAB - 1]


def test_no_token_yet_and_no_penalty() -> None:
    best = int(LOGITS.argmax())
    assert int(sample(LOGITS[None].clone(), [greedy(penalties=Penalties(1.0, 2.0, 2.0, (), ()))])) == best


def test_min_tokens_is_transformers() -> None:
    best = int(LOGITS.argmax())
    expected = MinLengthLogitsProcessor(5, best)(torch.tensor([[1, 2]]), LOGITS[None].clone())
    assert int(sample(LOGITS[None].clone(), [greedy(banned=(best,))])) == int(expected.argmax())


def test_logprobs_are_the_models_own() -> None:
    """Whatever is done to the logits before a token is drawn, and only for those that asked."""
    rows = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(8)) * 3
    expected = torch.log_softmax(rows, dim=-1)
    penalties = Penalties(1.5, 1.0, 1.0, PROMPT, GENERATED)
    ways = [
        greedy(num_logprobs=3),
        greedy(),
        Sample(1.7, 0, 0.9, 4, 2, num_logprobs=0),
        greedy(num_logprobs=20, penalties=penalties, bias=((7, 90.0),)),
        greedy(num_logprobs=1),
    ]
    tokens, logprobs = read(draw(rows, ways), ways)
    asked = [row for row, way in enumerate(ways) if way.num_logprobs >= 0]
    assert len(logprobs) == len(asked) and tokens[3] == 7
    for row, found in zip(asked, logprobs, strict=True):
        assert found.logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-5)
        assert found.rank == 1 + int((expected[row] > expected[row, tokens[row]]).sum())
        values, ids = expected[row].topk(ways[row].num_logprobs)
        assert [token for token, _ in found.top] == ids.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_random_numbers_are_uniform_and_repeatable() -> None:
    numbers = [uniform(seed, step) for seed in range(40) for step in range(50)]
    assert numbers == [uniform(seed, step) for seed in range(40) for step in range(50)]
    assert len(set(numbers)) == len(numbers)
    assert abs(sum(numbers) / len(numbers) - 0.5) < 0.03
    assert all(0 <= number < 1 for number in numbers)

"""More sequences than KV pages: the youngest wait, all end with the same tokens. Thousands of shapes: flat memory."""

from __future__ import annotations

import random
import re
from pathlib import Path

import psutil
import pytest

from flexgen_lite import EngineError, FlexGenLite, SamplingParams
from flexgen_lite.text.sizes import parse_size
from tests.engine_processes import workers_of
from tests.tiny_models import make_model, ragged_prompts

MIB = 1 << 20
LONG = SamplingParams(max_tokens=70, temperature=0.8, seed=3, ignore_eos=True)
OPTIONS = {"dtype": "float32", "attention_workers": 2, "attention_threads": 1, "max_sequences": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("opt", tmp_path_factory.mktemp("opt"), num_hidden_layers=2)


def least_ram(model: Path) -> int:
    with pytest.raises(EngineError) as refusal:
        FlexGenLite(model, ram=1 * MIB, **OPTIONS)
    match = re.search(r"needs at least ([\d.]+ \w+) of RAM", str(refusal.value))
    assert match
    return parse_size(match[1].replace(" ", ""))


def test_more_sequences_than_pages(model: Path) -> None:
    prompts = ragged_prompts(90, longest=20)
    with FlexGenLite(model, **OPTIONS) as roomy:
        expected = [list(c.token_ids) for c in roomy.generate(prompts, LONG)]
        assert roomy.status().totals["sent_back"] == 0
        stops = sorted({token for tokens in expected for token in tokens[:2]})
    with FlexGenLite(model, ram=least_ram(model) + 2 * MIB, **OPTIONS) as tight:
        short = SamplingParams(max_tokens=70, temperature=0.8, seed=3, ignore_eos=True, stop_token_ids=stops)
        for completion in tight.generate(prompts * 3, short):  # from now on short answers are expected
            assert len(completion.token_ids) <= 2
        found = tight.generate(prompts, LONG)
        assert tight.status().totals["sent_back"] > 0
        assert [list(completion.token_ids) for completion in found] == expected


def test_a_budget_that_is_said_to_be_enough_serves_a_long_row(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path, max_position_embeddings=4096)
    with FlexGenLite(model, ram=least_ram(model), **OPTIONS) as engine:
        long, short = engine.generate([[5] * 3900, [7] * 10], SamplingParams(max_tokens=10, ignore_eos=True))
    assert (long.error, short.error) == (None, None)
    assert len(long.token_ids) == 10


def test_thousands_of_shapes_take_no_more_memory_than_hundreds(tmp_path: Path) -> None:
    """Rows whose lengths differ make passes of nearly every number of rows, scored and sampled ones among them."""
    model = make_model("llama", tmp_path, num_hidden_layers=1, hidden_size=256, intermediate_size=1024, vocab_size=2000)
    rng = random.Random(0)
    with FlexGenLite(model, **OPTIONS) as engine:
        processes = [psutil.Process(engine.engine_pid), *workers_of(engine.engine_pid).values()]
        sizes = []
        for _ in range(6):
            prompts = [[rng.randrange(3, 2000) for _ in range(rng.randint(1, 100))] for _ in range(200)]
            engine.generate(prompts, [params_of(rng) for _ in prompts])
            sizes.append([own_bytes(process) for process in processes])
        status = engine.status()
    beyond = {name: found for name, found in status.processes.items() if found["peak"] > found["planned"]}
    assert not beyond
    assert status.totals["passes"] > 220, "so many numbers of rows, times the shapes of weights"
    grown = [last - first for first, last in zip(sizes[2], sizes[-1], strict=True)]
    # A rare pass may be the first to touch some of the workspace, which is planned; caches by shape took 160 MiB here.
    assert max(grown) < 32 * MIB, [[size // MIB for size in one] for one in sizes]


def params_of(rng: random.Random) -> SamplingParams:
    if rng.random() < 0.1:
        return SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=rng.randint(0, 20))
    options = {"top_p": 0.9, "logprobs": 5, "repetition_penalty": 1.1} if rng.random() < 0.1 else {}
    return SamplingParams(max_tokens=rng.randint(1, 20), temperature=0.5, seed=1, ignore_eos=True, **options)


def own_bytes(process: psutil.Process) -> int:
    """Anonymous memory."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")

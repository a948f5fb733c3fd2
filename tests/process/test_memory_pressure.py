"""More sequences than KV pages: the youngest wait, all end with the same tokens. Thousands of requests: flat memory."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest

from flexgen_lite import EngineError, FlexGenLite, SamplingParams
from flexgen_lite.sizes import parse_size
from tests.tiny_models import make_model, ragged_prompts

MIB = 1 << 20
LONG = SamplingParams(max_tokens=100, temperature=0.8, seed=3, ignore_eos=True)
OPTIONS = {"dtype": "float32", "attention_workers": 2, "attention_threads": 1, "max_sequences": 64}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("opt", tmp_path_factory.mktemp("opt"))


def least_ram(model: Path) -> int:
    with pytest.raises(EngineError) as refusal:
        FlexGenLite(model, ram=1 * MIB, **OPTIONS)
    match = re.search(r"needs at least ([\d.]+ \w+) of RAM", str(refusal.value))
    assert match
    return parse_size(match[1].replace(" ", ""))


def test_more_sequences_than_pages(model: Path) -> None:
    prompts = ragged_prompts(120, longest=20)
    with FlexGenLite(model, **OPTIONS) as roomy:
        expected = [list(c.token_ids) for c in roomy.generate(prompts, LONG)]
        assert roomy.status().totals["sent_back"] == 0
        stops = sorted({token for tokens in expected for token in tokens[:2]})
    with FlexGenLite(model, ram=least_ram(model) + 6 * MIB, **OPTIONS) as tight:
        short = SamplingParams(max_tokens=100, temperature=0.8, seed=3, ignore_eos=True, stop_token_ids=stops)
        for completion in tight.generate(prompts * 3, short):  # from now on short answers are expected
            assert len(completion.token_ids) <= 2
        found = tight.generate(prompts, LONG)
        assert tight.status().totals["sent_back"] > 0
        assert [list(completion.token_ids) for completion in found] == expected


def test_thousands_of_requests_take_no_more_memory_than_hundreds(model: Path) -> None:
    params = SamplingParams(max_tokens=3, temperature=0.5, seed=1, ignore_eos=True)
    prompts = ragged_prompts(500, longest=30)
    with FlexGenLite(model, **OPTIONS) as engine:
        coordinator = psutil.Process(engine._engine.pid)
        processes = [coordinator, *coordinator.children()]
        periods = []
        for _ in range(4):
            before = [own_bytes(process) for process in processes]
            for _ in range(3):
                engine.generate(prompts, params)
            periods.append([own_bytes(process) - size for process, size in zip(processes, before, strict=True)])
    # A larger pass than any before takes memory once; what is not given back grows with the requests every time.
    assert max(min(grown) for grown in zip(*periods, strict=True)) < MIB, periods


def own_bytes(process: psutil.Process) -> int:
    """Anonymous memory."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")

"""The engine as its users meet it: sampling, stopping, several clients, bad requests, streaming under a budget."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexgen_lite import Client, EngineError, FlexGenLite, SamplingParams
from tests.tiny_models import VOCAB, make_model, ragged_prompts, reference_tokens

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[FlexGenLite]:
    with FlexGenLite(model, dtype="float32", max_sequences=16, attention_workers=2, attention_threads=1) as engine:
        yield engine


def test_one_prompt_and_many(engine: FlexGenLite, model: Path) -> None:
    prompts = ragged_prompts(5, longest=30)
    expected = reference_tokens(model, prompts, 8)
    assert list(engine.generate(prompts[0], GREEDY).token_ids) == expected[0]
    assert [list(c.token_ids) for c in engine.generate(prompts, GREEDY)] == expected


def test_the_seed_alone_decides_the_draw(engine: FlexGenLite) -> None:
    """The same request, alone and among others, with and without top-k and top-p."""
    for options in ({}, {"top_k": 20}, {"top_p": 0.7}, {"top_k": 50, "top_p": 0.5}):
        params = SamplingParams(max_tokens=12, temperature=1.3, seed=5, ignore_eos=True, **options)
        prompts = ragged_prompts(9, longest=40, seed=3)
        alone = engine.generate(prompts[4], params)
        among = engine.generate(prompts, params)
        assert among[4].token_ids == alone.token_ids
        other = SamplingParams(max_tokens=12, temperature=1.3, seed=6, ignore_eos=True, **options)
        assert engine.generate(prompts[4], other).token_ids != alone.token_ids


def test_stop_tokens_min_tokens_and_max_tokens(engine: FlexGenLite) -> None:
    prompt = ragged_prompts(3, longest=20)[2]
    free = list(engine.generate(prompt, GREEDY).token_ids)
    stop = free[3]
    first = free.index(stop)
    stopped = engine.generate(
        prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    )
    assert (list(stopped.token_ids), stopped.finish_reason) == (free[: first + 1], "stop")
    later = engine.generate(
        prompt, SamplingParams(max_tokens=8, min_tokens=6, temperature=0, ignore_eos=True, stop_token_ids=[stop])
    )
    assert stop not in later.token_ids[:5] and len(later.token_ids) >= 6
    assert engine.generate(prompt, GREEDY).finish_reason == "length"


def test_requests_that_cannot_be_served_fail_alone(engine: FlexGenLite) -> None:
    good = ragged_prompts(2, longest=9)[1]
    answers = engine.generate([good, [], [VOCAB], [1] * 128, good], GREEDY)
    errors = [answer.error for answer in answers]
    assert errors[0] is None and errors[4] is None
    assert "empty" in (errors[1] or "")
    assert f"token id {VOCAB} is outside the vocabulary of {VOCAB}" in (errors[2] or "")
    assert "128 tokens" in (errors[3] or "")
    assert "no tokenizer" in (engine.generate("text", GREEDY).error or "")


def test_generation_ends_at_the_models_limit(engine: FlexGenLite) -> None:
    answer = engine.generate([5] * 120, SamplingParams(max_tokens=50, temperature=0, ignore_eos=True))
    assert (len(answer.token_ids), answer.finish_reason) == (8, "length")


def test_hundreds_of_ragged_requests_over_several_clients(engine: FlexGenLite, model: Path) -> None:
    """Each client gets its own answers, the same as a client alone."""
    prompts = ragged_prompts(240, longest=60, seed=9)
    results: dict[int, list[list[int]]] = {}

    def run(part: int) -> None:
        with Client(engine.endpoint) as client:
            completions = client.submit(prompts[part::4], GREEDY).results()
            results[part] = [list(c.token_ids) for c in completions]

    threads = [threading.Thread(target=run, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    sample = list(range(0, 240, 17))
    expected = reference_tokens(model, [prompts[i] for i in sample], 8)
    assert [results[i % 4][i // 4] for i in sample] == expected


def test_a_cancelled_job_ends_and_the_others_go_on(engine: FlexGenLite) -> None:
    long = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)
    prompts = ragged_prompts(40, longest=20)
    with Client(engine.endpoint) as client:
        job = client.submit(prompts, long)
        next(iter(job))
        job.cancel()
        reasons = [completion.finish_reason for completion in job.results()]
    assert "cancelled" in reasons
    assert engine.generate(prompts[0], GREEDY).error is None


@pytest.mark.parametrize(
    ("family", "word"),
    [("bloom", "BloomForCausalLM"), ("rwkv", "other state"), ("bert", "bidirectional"), ("t5", "encoder")],
)
def test_classes_that_cannot_be_served_are_refused(family: str, word: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(EngineError, match=word) as refusal:
        FlexGenLite(tmp_path, load_format="dummy")
    assert refusal.value.user_error and "\n" not in str(refusal.value)


def test_an_untested_class_proves_itself(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "helium", vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    prompts = ragged_prompts(3, longest=20)
    with FlexGenLite(tmp_path, dtype="float32") as engine:
        answers = [list(c.token_ids) for c in engine.generate(prompts, GREEDY)]
    assert answers == reference_tokens(tmp_path, prompts, 8)


def test_staged_weights_take_the_devices_path(model: Path) -> None:
    """What a GPU does, with the CPU in its place: layers copied into device slots, streamed from two host slots."""
    prompts = ragged_prompts(6, longest=50)
    with FlexGenLite(model, dtype="float32", stage_weights=True, layer_slots=2, micro_batches=3) as engine:
        answers = [list(c.token_ids) for c in engine.generate(prompts, GREEDY)]
        totals = engine.status().totals
    assert answers == reference_tokens(model, prompts, 8)
    assert totals["host-to-device_seconds"] > 0
    decoded = [len(prompt) + 1 + step for prompt in prompts for step in range(7)]
    assert totals["kv_read_bytes"] == sum(decoded) * 4 * 2 * 32 * 4, "4 layers, K and V of 2 heads of 16 float32"
    layers = totals["uploaded_bytes"] / totals["passes"]
    assert layers == pytest.approx(totals["disk_read_bytes"] / totals["passes"], rel=0.5)


def test_dummy_weights_need_no_checkpoint(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    with FlexGenLite(tmp_path, load_format="dummy") as engine:
        assert len(engine.generate([3, 4, 5], GREEDY).token_ids) == 8


def test_a_budget_too_small_says_what_is_needed(model: Path) -> None:
    with pytest.raises(EngineError, match=r"needs at least .* of RAM, 100\.0 MiB allowed: raise ram"):
        FlexGenLite(model, ram="100MiB")


def test_a_trace_is_written(model: Path, tmp_path: Path) -> None:
    import json

    trace = tmp_path / "trace.json"
    with FlexGenLite(model, trace=trace, layer_slots=2) as engine:
        engine.generate(ragged_prompts(3, longest=9), GREEDY)
    events = json.loads(trace.read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    processes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"disk", "compute", "attention", "pass"} <= tracks
    assert {"disk loader", "compute worker", "attention worker 0", "coordinator"} <= processes


def test_an_endpoint_is_never_taken_from_another(model: Path, tmp_path: Path) -> None:
    """Not from a file, not from a running engine; a dead engine's socket is no obstacle, and none is left behind."""
    plain = tmp_path / "plain"
    plain.write_text("precious")
    with pytest.raises(EngineError, match="there is a file of that name"):
        FlexGenLite(model, endpoint=f"ipc://{plain}")
    assert plain.read_text() == "precious"
    path = tmp_path / "engine"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with FlexGenLite(model, endpoint=f"ipc://{path}") as engine:
        with pytest.raises(EngineError, match="in use by another engine"):
            FlexGenLite(model, endpoint=f"ipc://{path}")
        assert len(engine.generate([3, 4], GREEDY).token_ids) == 8
    assert not path.exists()

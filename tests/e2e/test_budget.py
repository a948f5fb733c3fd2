"""A model far beyond its memory budget, held to that budget by the kernel."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.memory_cgroup import memory_cgroup
from tests.tiny_models import reference_tokens

GIB = 1 << 30
BUDGET = 2 * GIB
SHAPE = {
    "architectures": ["OPTForCausalLM"], "model_type": "opt", "hidden_size": 2048, "ffn_dim": 8192,
    "num_hidden_layers": 12, "num_attention_heads": 32, "word_embed_proj_dim": 2048, "max_position_embeddings": 2048,
    "vocab_size": 50272, "do_layer_norm_before": True, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
    "dtype": "float16",
}  # fmt: skip
RUN = """
import json, os, pathlib, sys
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
from flexgen_lite import FlexGenLite, SamplingParams
with FlexGenLite(sys.argv[2], ram=int(sys.argv[3]), dtype="float32", device="cpu") as engine:
    params = SamplingParams(max_tokens=int(sys.argv[5]), temperature=0.0, ignore_eos=True)
    completions = engine.generate(json.loads(sys.argv[4]), params)
    memory = engine.status().memory
    print(json.dumps({"tokens": [list(c.token_ids) for c in completions], "peak": memory["peak"], "plan": engine.plan}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPT-1.3B's shape, with half its layers, in float16: 1.4 GB in four shards; float32 in memory: 2.8 GB."""
    directory = tmp_path_factory.mktemp("opt")
    (directory / "config.json").write_text(json.dumps(SHAPE))
    noise = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float16)

    def tensor(number: int, *shape: int) -> np.ndarray:
        return np.resize(np.roll(noise, number * 4099), shape)

    prefix, shards = "model.decoder.", [{} for _ in range(4)]
    shards[0] |= {
        f"{prefix}embed_tokens.weight": tensor(1, 50272, 2048),
        f"{prefix}embed_positions.weight": tensor(2, 2050, 2048),
        f"{prefix}final_layer_norm.weight": np.ones(2048, np.float16),
        f"{prefix}final_layer_norm.bias": np.zeros(2048, np.float16),
    }
    for layer in range(SHAPE["num_hidden_layers"]):
        shard, at = shards[layer // 3], f"{prefix}layers.{layer}."
        square, attention = (2048, 2048), ("q_proj", "k_proj", "v_proj", "out_proj")
        products = {f"self_attn.{name}": square for name in attention} | {"fc1": (8192, 2048), "fc2": (2048, 8192)}
        for number, (name, shape) in enumerate(products.items()):
            shard[f"{at}{name}.weight"] = tensor(10 * layer + number, *shape)
            shard[f"{at}{name}.bias"] = np.zeros(shape[0], np.float16)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shard[f"{at}{name}.weight"] = np.ones(2048, np.float16)
            shard[f"{at}{name}.bias"] = np.zeros(2048, np.float16)
    index = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-00004.safetensors"
        save_file(shard, directory / file)
        index |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def test_the_kernel_holds_it_to_the_budget_and_the_tokens_are_the_same(model: Path) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(4, 50000) for _ in range(length)] for length in (40, 7, 21)]
    with memory_cgroup(BUDGET) as group:
        run = subprocess.run(
            [sys.executable, "-c", RUN, str(group.procs), str(model), str(BUDGET), json.dumps(prompts), "3"],
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert group.peak() <= BUDGET
    result = json.loads(run.stdout.splitlines()[-1])
    assert "streamed through" in result["plan"]
    assert result["peak"] <= BUDGET
    assert result["tokens"] == reference_tokens(model, prompts, 3)

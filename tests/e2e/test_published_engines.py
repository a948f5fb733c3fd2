"""What an engine does with checkpoints in published formats as it does with others: budgets, disks, devices, losses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexgen_lite import EngineError, FlexGenLite
from tests.e2e.test_quantization import GREEDY, MAX_TOKENS, SETTINGS, answers
from tests.fault_injection import Fault, inject, struck
from tests.loaded_weights import spec_of
from tests.published.checkpoint import base_model, publish
from tests.published.floats import E2M1
from tests.published.formats import FORMATS
from tests.tiny_models import ragged_prompts, reference_tokens

MIB = 1 << 20
PROMPTS = ragged_prompts(6, longest=40)


def published(name: str, family: str, directory: Path, **sizes: int) -> tuple[Path, Path]:
    model = base_model(family, directory / family, **sizes)
    return directory / name, publish(model, directory / name, FORMATS[name])


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return published("gptq-4bit-asym-v1", "qwen3-moe", tmp_path_factory.mktemp("gptq"))


@pytest.fixture(scope="module")
def expected(gptq: tuple[Path, Path]) -> list[list[int]]:
    return reference_tokens(gptq[1], PROMPTS, MAX_TOKENS)


def test_a_pass_reads_what_is_stored(tmp_path: Path) -> None:
    packed, exact = published("ct-nvfp4", "llama", tmp_path, hidden_size=512, intermediate_size=1024, head_dim=128)
    read = {}
    for model in (packed, exact):
        spec = spec_of(model)
        stored = sum(p.num_bytes for unit in spec.units[: spec.num_layers] for t in unit.tensors for p in t.pieces)
        with FlexGenLite(model, **SETTINGS | {"layer_slots": 2}) as engine:
            engine.generate(PROMPTS, GREEDY)
            totals = engine.status().totals
        read[model] = totals["disk_read_bytes"] / totals["passes"]
        # Beside the layers of a pass, all outside them once, and perhaps layers for a pass that does not follow.
        assert read[model] == pytest.approx(stored, rel=0.3)
    assert read[packed] < 0.16 * read[exact], "4.5 bits of 32"


def large_mxfp4(directory: Path) -> tuple[Path, Path]:
    """200 million parameters: 400 MB in bfloat16, 110 MB as they are stored."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5504, "head_dim": 512}
    small = base_model("llama", directory / "small")
    config = json.loads((small / "config.json").read_text()) | sizes
    h, i, kv = 2048, 5504, 1024
    shapes = {"self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h)}
    shapes |= {"self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i)}
    generator = torch.Generator().manual_seed(0)
    new: dict[str, torch.Tensor] = {"model.norm.weight": torch.ones(h).bfloat16()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        new[name] = torch.randn(config["vocab_size"], h, generator=generator).bfloat16()
    exact, values = dict(new), torch.cat((E2M1, -E2M1)).bfloat16()
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        norms = {f"{at}{name}.weight": new["model.norm.weight"].clone()
                 for name in ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
        new, exact = new | norms, exact | norms
        for name, (columns, width) in shapes.items():
            pairs = torch.randint(0, 256, (columns, width // 2), dtype=torch.uint8, generator=generator)
            powers = torch.randint(119, 122, (columns, width // 32), dtype=torch.uint8, generator=generator)
            new |= {f"{at}{name}.weight_packed": pairs, f"{at}{name}.weight_scale": powers}
            codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(1).int()
            scales = torch.exp2(powers.float() - 127).bfloat16()
            exact[f"{at}{name}.weight"] = (values[codes].unflatten(1, (-1, 32)) * scales[..., None]).flatten(1)
    section = {"quantization_config": dict(FORMATS["ct-mxfp4"].section)}
    for target, tensors, said in ((directory / "packed", new, section), (directory / "exact", exact, {})):
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config | said))
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return directory / "packed", directory / "exact"


def test_a_budget_that_only_the_packed_weights_fit(tmp_path: Path) -> None:
    packed, exact = large_mxfp4(tmp_path)
    settings = SETTINGS | {"dtype": "bfloat16"}
    with pytest.raises(EngineError, match="needs at least") as refused, FlexGenLite(packed, **settings, ram="100MiB"):
        pass
    least = re.search(r"at least ([\d.]+) (GiB|MiB)", str(refused.value))
    assert least is not None
    ram = int(float(least[1]) * (1024 if least[2] == "GiB" else 1) * MIB) + 180 * MIB
    with FlexGenLite(packed, **settings, ram=ram) as engine:
        assert "4 of 4 layers in RAM" in engine.plan
        found = [list(c.token_ids) for c in engine.generate(PROMPTS[1:4], GREEDY)]
        assert engine.status().memory["peak"] <= ram
    with FlexGenLite(exact, **settings, ram=ram) as engine:
        assert "streamed through" in engine.plan
        assert found == [list(c.token_ids) for c in engine.generate(PROMPTS[1:4], GREEDY)]


def test_checksums(gptq: tuple[Path, Path], expected: list[list[int]]) -> None:
    """The second engine compares those that the first one took."""
    for _ in range(2):
        assert answers(gptq[0], PROMPTS, layer_slots=2, verify_weights=True) == expected


def test_on_its_way_through_device_slots(gptq: tuple[Path, Path], expected: list[list[int]]) -> None:
    assert answers(gptq[0], PROMPTS, stage_weights=True, layer_slots=2, device_slots=2) == expected


def test_workers_killed_in_the_middle(
    gptq: tuple[Path, Path], expected: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inject(monkeypatch, tmp_path / "faults", Fault("load", 20, after=True), Fault("advance", 15))
    with FlexGenLite(gptq[0], **SETTINGS | {"layer_slots": 2}) as engine:
        assert [list(c.token_ids) for c in engine.generate(PROMPTS, GREEDY)] == expected
        assert struck(tmp_path / "faults") == {0, 1}
        assert engine.status().totals["restarts"] == 2


@pytest.mark.parametrize(
    ("name", "family", "dtype"),
    [("ct-int8", "llama", "float32"), ("ct-int8", "qwen3-moe", "bfloat16"), ("gptq-4bit-asym-v1", "llama", "bfloat16"),
     ("ct-mixed", "llama", "bfloat16")],
)  # fmt: skip
def test_activations_in_8_bits(name: str, family: str, dtype: str, tmp_path: Path) -> None:
    """Near those that are not rounded, and not the same. Of layers in FP8 activations stay as they are."""
    packed, _ = published(name, family, tmp_path)
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 1]

    def scores(**changes: str) -> torch.Tensor:
        with FlexGenLite(packed, **SETTINGS | changes) as engine:
            return torch.tensor([score.logprob for score in engine.loglikelihood(prompts)])

    exact, rounded = scores(), scores(activations="int8", dtype=dtype)
    assert torch.allclose(rounded, exact, rtol=0.05, atol=1)
    assert not torch.equal(rounded, exact)

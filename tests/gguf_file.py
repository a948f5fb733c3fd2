"""GGUF files of tiny models, written by NumPy block by block, and what their weights stand for."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

Array = npt.NDArray[Any]
F32, F16, BF16 = "F32", "F16", "BF16"
TYPES = {
    F32: 0, F16: 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, BF16: 30,
}  # fmt: skip
BLOCKS = {name: 256 if name.endswith("K") else 32 for name in TYPES if name.startswith("Q")}
_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp", "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps", "mlp.experts.down_proj": "ffn_down_exps",
    "block_sparse_moe.gate": "ffn_gate_inp", "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps", "block_sparse_moe.experts.w2": "ffn_down_exps",
    "post_attention_layernorm": "ffn_norm", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ARCHITECTURES = {
    "llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3", "olmoe": "olmoe",
}  # fmt: skip


def _runs(weight: Array, size: int) -> Array:
    return weight.reshape(len(weight), -1, size).astype(np.float32)


def _bytes(half: Array) -> Array:
    """Of scales in float16."""
    return np.ascontiguousarray(half.astype(np.float16)).view(np.uint8).reshape(*half.shape, 2)


def _fours(q: Array) -> Array:
    return np.asarray(q[..., :16] | (q[..., 16:] << 4), np.uint8)


def _top_bits(q: Array) -> Array:
    return np.packbits(((q >> 4) & 1).astype(np.uint8), axis=-1, bitorder="little")


def blocks(kind: str, weight: Array) -> tuple[Array, Array]:
    """A weight `[N, K]`, roughly: its bytes, row by row, and what these stand for, in float32."""
    if kind.endswith("K"):
        data, exact = _sixes(weight) if kind == "Q6_K" else _with_least(weight, 4 if kind == "Q4_K" else 5)
    else:
        data, exact = _of_32(kind, _runs(weight, 32))
    return data.reshape(len(weight), -1), exact.reshape(weight.shape)


def _of_32(kind: str, x: Array) -> tuple[Array, Array]:
    bits, has_least = int(kind[1]), kind.endswith("1")
    most, middle = (1 << bits) - 1, 0 if has_least else 1 << (bits - 1)
    least = x.min(-1).astype(np.float16) if has_least else np.zeros(x.shape[:-1], np.float16)
    span = x.max(-1) - x.min(-1) if has_least else 2 * np.abs(x).max(-1)
    d = (span / most).astype(np.float16)
    wide = d.astype(np.float32)[..., None]
    q = np.clip(np.rint((x - least.astype(np.float32)[..., None]) / wide) + middle, 0, most).astype(np.int64)
    exact = (q - middle).astype(np.float32) * wide + least.astype(np.float32)[..., None]
    parts = [_bytes(d), *([_bytes(least)] if has_least else []), *([_top_bits(q)] if bits == 5 else [])]
    items = (q - 128).astype(np.int8).view(np.uint8) if bits == 8 else _fours(q & 15)
    return np.concatenate([*parts, items], -1), exact


def _with_least(weight: Array, bits: int) -> tuple[Array, Array]:
    x = _runs(weight, 256).reshape(len(weight), -1, 8, 32)
    least, most = np.maximum(0, -x.min(-1)), (1 << bits) - 1
    span = (x.max(-1) + least) / most
    d, d_least = ((part.max(-1) / 63).astype(np.float16) for part in (span, least))
    scale, offset = (
        np.clip(np.rint(part / np.maximum(unit.astype(np.float32), 1e-9)[..., None]), 0, 63).astype(np.int64)
        for part, unit in ((span, d), (least, d_least))
    )
    factor = d.astype(np.float32)[..., None] * scale.astype(np.float32)
    taken = d_least.astype(np.float32)[..., None] * offset.astype(np.float32)
    q = np.clip(np.rint((x + taken[..., None]) / np.maximum(factor, 1e-9)[..., None]), 0, most).astype(np.int64)
    exact = factor[..., None] * q.astype(np.float32) - taken[..., None]
    packed = np.zeros((*d.shape, 12), np.int64)
    packed[..., :4] = scale[..., :4] | ((scale[..., 4:] >> 4) << 6)
    packed[..., 4:8] = offset[..., :4] | ((offset[..., 4:] >> 4) << 6)
    packed[..., 8:] = (scale[..., 4:] & 15) | ((offset[..., 4:] & 15) << 4)
    low = q & 15
    items = (low[..., ::2, :] | (low[..., 1::2, :] << 4)).reshape(*d.shape, 128)
    high = np.sum((q >> 4) << np.arange(8)[:, None], axis=-2)
    parts = [_bytes(d), _bytes(d_least), packed, *([high] if bits == 5 else []), items]
    return np.concatenate([part.astype(np.uint8) for part in parts], -1), exact


def _sixes(weight: Array) -> tuple[Array, Array]:
    x = _runs(weight, 256).reshape(len(weight), -1, 16, 16)
    span = np.abs(x).max(-1) / 31 * np.where(np.arange(16) % 3 == 0, -1, 1)  # a scale may be negative
    d = (np.abs(span).max(-1) / 127).astype(np.float16)
    scale = np.rint(span / d.astype(np.float32)[..., None]).astype(np.int8)
    factor = d.astype(np.float32)[..., None] * scale.astype(np.float32)
    divisor = np.where(factor == 0, np.float32(1), factor)[..., None]
    q = np.clip(np.rint(x / divisor), -32, 31).astype(np.int64)
    exact = factor[..., None] * q.astype(np.float32)
    u = (q + 32).reshape(*d.shape, 2, 4, 32)
    low, top = u & 15, u >> 4
    lows = np.concatenate([low[..., 0, :] | (low[..., 2, :] << 4), low[..., 1, :] | (low[..., 3, :] << 4)], -1)
    tops = np.sum(top << (2 * np.arange(4)[:, None]), axis=-2)
    parts = [lows.reshape(*d.shape, 128), tops.reshape(*d.shape, 64), scale.view(np.uint8), _bytes(d)]
    return np.concatenate([part.astype(np.uint8) for part in parts], -1), exact


def stored(kind: str, weight: Array) -> tuple[bytes, Array]:
    """A tensor of any type: its bytes, and what they stand for."""
    if kind in BLOCKS:
        data, exact = blocks(kind, weight.reshape(-1, weight.shape[-1]))
        return data.tobytes(), exact.reshape(weight.shape)
    dtype = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[kind]
    tensor = torch.from_numpy(np.ascontiguousarray(weight, np.float32)).to(dtype)
    return tensor.view(torch.uint8).numpy().tobytes(), tensor.float().numpy()


def _string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str | bytes):
        return struct.pack("<I", 8) + _string(value)
    items = [_value(item) for item in value]
    return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)


@dataclass
class GgufFile:
    """
    Attributes:
        tensors: by name: type, shape as Transformers has it, bytes.
        places: of tensors that are to be said to lie elsewhere than they do.
    """

    values: dict[str | bytes, Any]
    tensors: dict[str, tuple[int, tuple[int, ...], bytes]] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    alignment: int = 32

    def add(self, name: str, kind: str, weight: Array) -> Array:
        """What it stands for then."""
        data, exact = stored(kind, weight)
        self.tensors[name] = (TYPES[kind], weight.shape, data)
        return exact

    def data(self, start: bytes = struct.pack("<4sI", b"GGUF", 3), **counts: int) -> bytes:
        """`counts`: what it says of its numbers of tensors and values."""
        numbers = {"tensors": len(self.tensors), "values": len(self.values)} | counts
        head = start + struct.pack("<QQ", numbers["tensors"], numbers["values"])
        head += b"".join(_string(key) + _value(value) for key, value in self.values.items())
        at, body = 0, b""
        for name, (kind, shape, data) in self.tensors.items():
            place = self.places.get(name, at)
            head += _string(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
            head += struct.pack("<IQ", kind, place)
            body += data + bytes(-len(data) % self.alignment)
            at = len(body)
        return head + bytes(-len(head) % self.alignment) + body

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data())
        return path


def tokenizer_values(directory: Path, special: list[str], template: str) -> dict[str, Any]:
    """What a file says of the byte-level tokenizer of a directory."""
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.chat_template": template,
    }  # fmt: skip


def kind_of(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Norms and routers stay in float32, and rows that are no whole blocks."""
    if len(shape) == 1 or name.endswith("mlp.gate.weight") or shape[-1] % BLOCKS.get(kind, 1):
        return F32
    return kind


def to_gguf(model: Path, path: Path, kinds: dict[str, str], **values: Any) -> Path:
    """The model of a Transformers directory as GGUF; its own weights become what the file stands for.

    Args:
        kinds: types by parts of Transformers' names; "": of all others.
        values: more of the file's.
    """
    config = json.loads((model / "config.json").read_text())
    weights = {name: t.float().numpy() for file in model.glob("*.safetensors") for name, t in load_file(file).items()}
    file, exact = GgufFile(_values(config) | values), {}
    is_gemma = config["model_type"].startswith("gemma")
    stacked: dict[str, dict[int, str]] = {}
    for name in sorted(weights):
        expert = re.fullmatch(r"(.*\.experts)\.(\d+)(\..*)", name)
        stacked.setdefault(expert[1] + expert[3] if expert else name, {})[int(expert[2]) if expert else 0] = name
    for name, sources in stacked.items():
        weight = np.stack([weights[sources[i]] for i in sorted(sources)])
        weight = weight if ".experts." in name else weight[0]
        kind = kind_of(name, weight.shape, next((k for part, k in kinds.items() if part and part in name), kinds[""]))
        rows = _paired(weight, config, name) if config["model_type"] in ("llama", "mixtral") else weight
        is_norm = is_gemma and name.endswith("norm.weight")
        found = file.add(_name(name, is_gemma), kind, rows + np.float32(1) if is_norm else rows)
        found = found - np.float32(1) if is_norm else found
        found = _paired(found, config, name, undo=True) if config["model_type"] in ("llama", "mixtral") else found
        for i, source in sorted(sources.items()):
            exact[source] = torch.from_numpy(np.ascontiguousarray(found[i] if ".experts." in name else found))
    for old in model.glob("model*"):
        old.unlink()
    save_file(exact, model / "model.safetensors", {"format": "pt"})
    return file.write(path)


def _name(name: str, is_gemma: bool) -> str:
    module, _, suffix = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{suffix}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{(_LAYER | _GEMMA if is_gemma else _LAYER)[rest]}.{suffix}"


def _paired(weight: Array, config: dict[str, Any], name: str, undo: bool = False) -> Array:
    """Rows of q and k as llama.cpp's converter orders them."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return weight
    halves = (config[heads], -1, 2) if undo else (config[heads], 2, weight.shape[0] // config[heads] // 2)
    return weight.reshape(*halves, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _values(config: dict[str, Any]) -> dict[str | bytes, Any]:
    name = _ARCHITECTURES[config["model_type"]]
    rope = config["rope_parameters"]
    own = {
        "context_length": config["max_position_embeddings"], "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "attention.key_length": config.get("head_dim"), "attention.sliding_window": config.get("sliding_window"),
        "expert_count": config.get("num_experts", config.get("num_local_experts")),
        "expert_used_count": config.get("num_experts_per_tok"),
        "expert_feed_forward_length": config.get("moe_intermediate_size"),
    }  # fmt: skip
    own["expert_count"] = own["expert_count"] or config.get("num_local_experts")
    tokens = {"bos": config["bos_token_id"], "eos": config["eos_token_id"], "padding": config["pad_token_id"]}
    return {
        "general.architecture": name,
        **{f"{name}.{key}": value for key, value in own.items() if value is not None},
        **{f"tokenizer.ggml.{key}_token_id": value for key, value in tokens.items() if value is not None},
    }

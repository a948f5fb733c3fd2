"""All formats that the tests write, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from tests.compressed_checkpoint import Form, parts_of, rounded
from tests.published import bitsandbytes, torchao
from tests.published.checkpoint import Format, Parts, Written
from tests.published.floats import e4m3, mxfp4, nvfp4
from tests.published.whole_numbers import awq, awq_gemv, gptq, scattered, signed

Writer = Callable[[torch.Tensor], Written]
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
BLOCKS = FP8 | {"weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}


def every(write: Writer) -> Callable[[str, torch.Tensor], Written | None]:
    """Writes all layers alike."""
    return lambda layer, weight: write(weight)


def in_e4m3(
    weight: torch.Tensor,
    block: tuple[int, int] | None,
    kind: str = "float32",
    scales: str = ".weight_scale_inv",
    shape: tuple[int, ...] | None = None,
    **others: torch.Tensor,
) -> Written:
    """FP8 with scales by the name `scales`, seen as `shape`; `others` are beside it."""
    q, scale, exact = e4m3(weight, block, kind)
    parts = {".weight": q, scales: scale if shape is None else scale.reshape(shape)}
    return parts | {f".{name}": tensor for name, tensor in others.items()}, exact


def _joined_experts(layer: str, weight: torch.Tensor) -> Written:
    if weight.dim() == 2:
        return in_e4m3(weight, (128, 128))
    every_part = zip(*(e4m3(expert, (128, 128)) for expert in weight), strict=True)
    q, scale, exact = (torch.stack(list(parts)) for parts in every_part)
    return {"": q, "_scale_inv": scale}, exact


def _apart_from_attention(layer: str, weight: torch.Tensor) -> Written | None:
    """As of fbgemm_fp8: attention and the first layer stay in 16 bits."""
    if "self_attn" in layer or "layers.0." in layer:
        return None
    return in_e4m3(weight, (1, weight.shape[1]), scales=".weight_scale", input_scale_ub=torch.tensor([1200.0]))


def _in_mxfp4(layer: str, weight: torch.Tensor) -> Written | None:
    """Experts of gpt-oss, `[E, K, N]`."""
    if weight.dim() == 2:
        return None
    count, width, columns = weight.shape
    pairs, exponents, exact = mxfp4(weight.transpose(1, 2).reshape(-1, width))
    parts = {"_blocks": pairs.view(count, columns, -1, 16), "_scales": exponents.view(count, columns, -1)}
    return parts, exact.view(count, columns, width).transpose(1, 2)


def _experts_in_e2m1(layer: str, weight: torch.Tensor) -> Written:
    """As of DeepSeek V4: experts in 4 bits, all else in FP8."""
    if ".experts." not in layer:
        return in_e4m3(weight, (128, 128), "float8_e8m0fnu", ".scale")
    pairs, exponents, exact = mxfp4(weight)
    return {".weight": pairs.view(torch.int8), ".scale": exponents.view(torch.float8_e8m0fnu)}, exact


def _in_nvfp4(weight: torch.Tensor, of_modelopt: bool) -> Written:
    pairs, scales, number, exact = nvfp4(weight, divides=not of_modelopt)
    if of_modelopt:
        parts = {".weight": pairs, ".weight_scale_2": number, ".input_scale": torch.tensor(0.01)}
    else:
        parts = {".weight_packed": pairs, ".weight_global_scale": number[None], ".input_global_scale": torch.ones(1)}
    return parts | {".weight_scale": scales}, exact


def _packed_mxfp4(weight: torch.Tensor) -> Written:
    pairs, exponents, exact = mxfp4(weight)
    return {".weight_packed": pairs, ".weight_scale": exponents}, exact


def _packed_whole(weight: torch.Tensor, form: Form) -> Written:
    q, scale, zero, exact = rounded(weight, form)
    return {f".{name}": part for name, part in parts_of(q, scale, zero, form.bits).items()}, exact


def _bytes(weight: torch.Tensor, is_symmetric: bool, bits: int = 8, group: int | None = None) -> Written:
    q, scale, zero, exact = signed(weight, bits, group, is_symmetric, torch.bfloat16)
    parts: Parts = {".weight": q, ".weight_scale": scale}
    return parts if is_symmetric else parts | {".weight_zero_point": zero}, exact


def _with_wide_zeros(weight: torch.Tensor) -> Written:
    parts, exact = _bytes(weight, is_symmetric=False)
    return parts | {".weight_zero_point": parts[".weight_zero_point"].int()}, exact


def _in_one_piece(weight: torch.Tensor) -> Written:
    """One scale and one zero for all of it."""
    parts, exact = _bytes(weight.reshape(1, -1), is_symmetric=False)
    parts = {name: part.reshape(weight.shape) if name == ".weight" else part.reshape(1) for name, part in parts.items()}
    return parts, exact.reshape(weight.shape)


def _packed_scattered(weight: torch.Tensor) -> Written:
    """With actorder=group of older versions."""
    places = scattered(weight)
    parts, exact = _packed_whole(weight[:, places], Form(8, 32))
    back = places.argsort()
    q, *_ = rounded(weight[:, places], Form(8, 32))
    parts[".weight_packed"] = parts_of(q[:, back], torch.ones(1), None, 8)["weight_packed"]
    return parts | {".weight_g_idx": back.int() // 32}, exact[:, back]


def _by_kind_of_layer(layer: str, weight: torch.Tensor) -> Written:
    """Attention in FP8, some layers in 8 bits, the others in 4."""
    if "self_attn" in layer:
        return in_e4m3(weight, (1, weight.shape[1]), "bfloat16", ".weight_scale")
    return _bytes(weight, True) if "down_proj" in layer else _packed_whole(weight, Form(4, 32, False))


def _compressed(form: str, weights: Mapping[str, Any], **group: Any) -> dict[str, Any]:
    """A quantization_config with one group."""
    groups = {"group_0": {"targets": ["Linear"], "weights": dict(weights), "format": form, **group}}
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "format": form,
        "config_groups": groups, "ignore": ["lm_head", "re:.*mlp.gate$"],
    }  # fmt: skip


FOUR = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}


def _mixed() -> dict[str, Any]:
    one: dict[str, Any] = {"strategy": "channel", "symmetric": True}
    groups = {
        "attention": ("re:.*self_attn.*_proj$", "float-quantized", one | {"num_bits": 8, "type": "float"}),
        "down": ("re:.*down_proj$", "int-quantized", one | {"num_bits": 8, "type": "int"}),
        "others": ("re:.*(gate|up)_proj$", "pack-quantized", FOUR),
    }
    found = {name: {"targets": [t], "format": form, "weights": w} for name, (t, form, w) in groups.items()}
    return _compressed("mixed-precision", {}) | {"config_groups": found}


FLOAT_8 = {"num_bits": 8, "type": "float", "symmetric": True}
FLOAT_4 = {"num_bits": 4, "type": "float", "symmetric": True}
INT_8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
TOKENS = {"num_bits": 8, "strategy": "token", "dynamic": True}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
MODELOPT_FILE = {
    "producer": {"name": "modelopt", "version": "0.29.0"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]},
}  # fmt: skip
BNB_4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ONE: tuple[int, ...] = (1,)

FORMATS: dict[str, Format] = {
    "fp8-blocks": Format(every(partial(in_e4m3, block=(128, 128))), BLOCKS),
    "fp8-blocks-bfloat16": Format(every(partial(in_e4m3, block=(64, 32), kind="bfloat16")),
                                  BLOCKS | {"weight_block_size": [64, 32]}),
    "fp8-blocks-ue8m0": Format(every(partial(in_e4m3, block=(128, 128), kind="float8_e8m0fnu")),
                               BLOCKS | {"scale_fmt": "ue8m0"}),
    "fp8-blocks-joined-experts": Format(_joined_experts, BLOCKS, joins_experts=True),
    "fp8-one-scale": Format(
        every(partial(in_e4m3, block=None, kind="bfloat16", shape=(), activation_scale=torch.tensor(0.02))),
        FP8 | {"activation_scheme": "static", "weight_block_size": None},
    ),
    "fp8-auto-fp8": Format(
        every(partial(in_e4m3, block=None, scales=".weight_scale", shape=ONE, input_scale=torch.tensor([0.02]))), FP8),
    "fp8-fp4-experts": Format(_experts_in_e2m1, BLOCKS | {"scale_fmt": "ue8m0", "expert_dtype": "fp4"}),
    "fbgemm": Format(_apart_from_attention, {
        "quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}),
    "mxfp4": Format(_in_mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}),
    "ct-int8": Format(every(partial(_bytes, is_symmetric=True)),
                      _compressed("int-quantized", INT_8, input_activations=TOKENS)),
    "ct-int8-zeros": Format(every(partial(_bytes, is_symmetric=False)),
                            _compressed("int-quantized", INT_8 | {"symmetric": False})),
    "ct-int8-zeros-int32": Format(every(_with_wide_zeros), _compressed(
        "int-quantized", INT_8 | {"symmetric": False})),
    "ct-int8-tensor": Format(every(_in_one_piece), _compressed(
        "int-quantized", INT_8 | {"symmetric": False, "strategy": "tensor"})),
    "ct-int4-in-bytes": Format(every(partial(_bytes, is_symmetric=True, bits=4, group=32)), _compressed(
        "int-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True})),
    "ct-fp8-tensor": Format(every(partial(in_e4m3, block=None, kind="bfloat16", scales=".weight_scale", shape=ONE)),
                            _compressed("float-quantized", FLOAT_8 | {"strategy": "tensor"})),
    "ct-fp8-channel": Format(
        every(lambda w: in_e4m3(w, (1, w.shape[1]), "bfloat16", ".weight_scale", k_scale=torch.ones(1))),
        _compressed("float-quantized", FLOAT_8 | {"strategy": "channel"})),
    "ct-fp8-block": Format(
        every(partial(in_e4m3, block=(128, 128), kind="bfloat16", scales=".weight_scale")),
        _compressed("float-quantized", FLOAT_8 | {"strategy": "block", "block_structure": [128, 128]})),
    "ct-mxfp8": Format(
        every(partial(in_e4m3, block=(1, 32), kind="uint8", scales=".weight_scale")),
        _compressed("mxfp8-quantized", FLOAT_8 | {"strategy": "group", "group_size": 32})),
    "ct-nvfp4": Format(every(partial(_in_nvfp4, of_modelopt=False)), _compressed(
        "nvfp4-pack-quantized", FLOAT_4 | {"strategy": "tensor_group", "group_size": 16})),
    "ct-mxfp4": Format(every(_packed_mxfp4), _compressed(
        "mxfp4-pack-quantized", FLOAT_4 | {"strategy": "group", "group_size": 32})),
    "ct-packed": Format(every(partial(_packed_whole, form=Form(4, 32, False))), _compressed(
        "pack-quantized", FOUR)),
    "ct-packed-g-idx": Format(every(_packed_scattered), _compressed(
        "pack-quantized", INT_8 | {"strategy": "group", "group_size": 32, "actorder": "group"})),
    "ct-mixed": Format(_by_kind_of_layer, _mixed()),
    **{
        f"gptq-{bits}bit-{'sym' if symmetric else 'asym'}-v{version}": Format(
            every(partial(gptq, bits=bits, group=group, is_symmetric=symmetric, version=version)),
            {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": symmetric, "desc_act": False,
             "checkpoint_format": "gptq_v2" if version == 2 and not symmetric else "gptq"})
        for bits, group, symmetric, version in (
            (4, 32, True, 1), (4, 32, True, 2), (4, 32, False, 1), (4, 32, False, 2), (8, None, True, 1),
            (8, 32, False, 2), (3, 32, True, 1), (2, 32, False, 1),
        )
    },
    "auto-round": Format(every(partial(gptq, bits=4, group=32, is_symmetric=False, version=2)), {
        "quant_method": "auto-round", "packing_format": "auto_round:exllamav2", "bits": 4, "group_size": 32,
        "sym": False, "data_type": "int"}),
    "auto-round-for-gptq": Format(every(partial(gptq, bits=4, group=32, is_symmetric=False, version=1)), {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 32,
        "sym": False}),
    "auto-round-2024": Format(every(partial(gptq, bits=8, group=32, is_symmetric=False, version=2)), {
        "quant_method": "intel/auto-round", "backend": "autoround:exllamav2", "bits": 8, "group_size": 32,
        "sym": False}),
    "gptq-quantize-config": Format(
        every(partial(gptq, bits=4, group=32, is_symmetric=False, version=1)),
        {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": False}, "quantize_config.json"),
    **{
        f"gptq-{bits}bit-desc-act": Format(
            every(partial(gptq, bits=bits, group=32, is_symmetric=False, version=2, is_sorted=False)),
            {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": False, "desc_act": True,
             "checkpoint_format": "gptq_v2"})
        for bits in (4, 8)
    },
    "awq-gemv": Format(every(partial(awq_gemv, group=32)), {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemv"}),
    "awq": Format(every(partial(awq, group=32)), {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "awq-symmetric": Format(every(partial(awq, group=16, is_symmetric=True)), {
        "quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": False, "version": "GEMM"}),
    "awq-unnamed": Format(every(partial(awq, group=32)), {
        "zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}),
    "awq-quant-config": Format(every(partial(awq, group=32)), {
        "zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}, "quant_config.json"),
    "modelopt-nvfp4": Format(every(partial(_in_nvfp4, of_modelopt=True)), MODELOPT),
    "modelopt-fp8": Format(
        every(partial(in_e4m3, block=None, scales=".weight_scale", shape=(), input_scale=torch.tensor(0.02))),
        MODELOPT | {"quant_algo": "FP8"}),
    "modelopt-fp8-own-file": Format(
        every(partial(in_e4m3, block=None, scales=".weight_scale", shape=(), input_scale=torch.tensor(0.02))),
        MODELOPT_FILE, "hf_quant_config.json"),
    "bnb-nf4": Format(every(partial(bitsandbytes.four_bits, kind="nf4")), BNB_4),
    "bnb-nf4-double": Format(every(partial(bitsandbytes.four_bits, kind="nf4", is_double=True)),
                             BNB_4 | {"bnb_4bit_use_double_quant": True}),
    "bnb-nf4-stored-as-bfloat16": Format(
        every(partial(bitsandbytes.four_bits, kind="nf4", is_double=True, storage=torch.bfloat16)),
        BNB_4 | {"bnb_4bit_quant_storage": "bfloat16"}),
    "bnb-fp4": Format(every(partial(bitsandbytes.four_bits, kind="fp4")),  # named since 2024
                      {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "bnb-int8": Format(every(bitsandbytes.eight_bits), {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    **{
        f"torchao-{kind}": Format(
            every(partial(torchao.written, kind)), torchao.section(kind), num_files=1,
            metadata=partial(torchao.metadata, kind))
        for kind in torchao.CONFIGS
    },
}  # fmt: skip
"""What the model's config.json or a file beside it says is as the tools write it, but for what nothing depends on."""
ONLY_FOR = {
    "fp8-blocks-joined-experts": ["qwen3-moe"], "fp8-fp4-experts": ["qwen3-moe"], "mxfp4": ["gpt-oss"],
    "gptq-4bit-desc-act": ["llama"], "gptq-8bit-desc-act": ["llama"], "ct-packed-g-idx": ["llama"],
}  # fmt: skip
"""Formats that some families alone have."""


def pairs_of(families: list[str]) -> list[tuple[str, str]]:
    """Formats and families that go together."""
    return [(name, family) for name in FORMATS for family in ONLY_FOR.get(name, families)]

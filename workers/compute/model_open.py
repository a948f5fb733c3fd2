"""Opens a model for serving: class, description of its tensors and attention, tokenizer; reads no weight."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexgen_lite.model.checkpoint import Checkpoint, check_config, model_source, open_checkpoint
from flexgen_lite.model.files import CheckpointError, check_files, is_there
from flexgen_lite.model.formats.gguf import all_parts, open_gguf
from flexgen_lite.model.formats.gguf_header import is_gguf
from flexgen_lite.model.formats.section import Section
from flexgen_lite.model.packing import STEP
from flexgen_lite.model.spec import ModelSpec
from flexgen_lite.wire.worker_messages import OpenModel
from flexgen_lite.workers.compute import attention_call, experts, fused, probe
from flexgen_lite.workers.compute.device import Device
from flexgen_lite.workers.compute.head import Head
from flexgen_lite.workers.compute.host_projections import projections_of
from flexgen_lite.workers.compute.latents import projections
from flexgen_lite.workers.compute.mixers import prepare, read_projections
from flexgen_lite.workers.compute.product_weights import serves_width
from flexgen_lite.workers.compute.products import Products
from flexgen_lite.workers.compute.trial import find_text_path, outside
from flexgen_lite.workers.model import builder as model_builder
from flexgen_lite.workers.model.quantization import HeldBits, holds_bits, packings, warnings_of
from flexgen_lite.workers.model.tokenizer import TOKENIZER_FILES, ModelTokenizer, open_tokenizer
from flexgen_lite.workers.model.weight_map import Binding, map_weights
from flexgen_lite.workers.serve import UserError, first_line
from flexgen_lite.workers.simd import PAIRS

MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
SAME_AGAIN = ["original/*", "consolidated*"]  # weights as their makers' own code has them


@dataclass
class OpenedModel:
    model: PreTrainedModel
    layers: tuple[nn.Module, ...]
    binding: Binding
    products: Products
    head: Head
    spec: ModelSpec
    tokenizer: ModelTokenizer
    projections: tuple[tuple[nn.Module, ...], ...]  # by layer

    def modules(self, unit: int) -> list[nn.Module]:
        """The modules whose weights `unit` holds: those of a layer, or all outside the layers."""
        if unit < len(self.layers):
            return list(self.layers[unit].modules())
        return outside(self.model, self.layers)


def open_model(order: OpenModel, device: Device, run_dir: str) -> OpenedModel:
    """Raises UserError or CheckpointError, whatever is in the model's directory: all of it is the user's."""
    try:
        return _open(order, model_directory(order.model), device, run_dir)
    except (UserError, CheckpointError):
        raise
    except Exception as error:  # Transformers raises whatever its code runs into
        raise UserError(
            f"{order.model} cannot be opened as a model ({type(error).__name__}: {first_line(error)}): "
            f"{'' if is_gguf(Path(order.model)) else 'check its config.json, or '}download it again"
        ) from error


def _open(order: OpenModel, directory: Path, device: Device, run_dir: str) -> OpenedModel:
    """`directory` may be a GGUF file."""
    section = check_config(directory)
    check_files(directory, (*TOKENIZER_FILES, "generation_config.json"))
    config = model_builder.load_config(directory)
    attention_call.register()
    experts.register()
    model_builder.language_model_class(config)
    model_builder.check_sizes(directory, config)
    is_known = config.model_type in probe.TESTED_TYPES and not order.always_probe
    keeps_latents = is_known or probe.prove(config)
    checkpoint = None if order.load_format == "dummy" else open_checkpoint(directory)
    is_stored = _check_quantization(order, directory, section, checkpoint)
    dtype = _dtype(order.dtype, config, checkpoint, device)
    model = model_builder.build(config, dtype)
    path = find_text_path(model, keeps_latents)
    layers, text = path.layers, model_builder.text_config(config)
    read = projections(model.modules()) | read_projections(model.modules())
    # Values of weights in few bits lie in the order of the kernels that multiply with them here.
    unpacked_first = device.torch_device.type == "cpu" and not (dtype == torch.bfloat16 and serves_width(STEP * 2))
    value_order = "int8" if unpacked_first or order.activations == "int8" else "bfloat16"
    quantization = None if is_stored else order.quantization
    wanted = packings(model, quantization, read, value_order) if quantization is not None else {}
    other_order = "int8" if unpacked_first else "bfloat16"
    held = HeldBits(holds_bits(model, read), value_order, order.activations == "int8", other_order)
    units, warnings = map_weights(model, layers, checkpoint, dtype, path.unused, wanted, held)
    packed = {tensor.name: tensor.packing for unit in units for tensor in unit.tensors if tensor.packing is not None}
    limit, warning = model_builder.max_length(text, path.has_indexers)
    tokenizer = open_tokenizer(directory, run_dir, config)
    if order.max_model_len is not None and order.max_model_len > limit:
        raise UserError(f"max_model_len {order.max_model_len} is over the model's limit of {limit}: lower it")
    leading = projections_of(model, path, units, read)
    products = Products(model, dtype, device.torch_device, read, packed)
    fused.fuse(model, dtype, device.torch_device)
    prepare(model.modules(), path.states, device.torch_device.type == "cpu")
    spec = ModelSpec(
        model_type=config.model_type,
        class_name=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        num_layers=len(layers),
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=_widest(layers, getattr(text, "num_experts_per_tok", None) or 1),
        max_length=order.max_model_len or limit,
        eos_token_ids=model_builder.eos_token_ids(directory, config),
        bos_token_id=model_builder.bos_token_id(directory, config),
        num_parameters=sum(p.numel() for p in model.parameters()),
        files=tuple(str(file) for file in checkpoint.files) if checkpoint else (),
        stamps=checkpoint.stamps if checkpoint else (),
        units=units,
        columns=path.columns,
        attention=path.attention,
        kv_columns=path.kv_columns,
        stops=path.stops,
        states=path.states,
        held_bytes=path.held_bytes,
        pass_bytes=path.pass_bytes,
        mix_bytes=path.mix_bytes,
        head_copy_bytes=products.copied_bytes(outside(model, layers)),
        projections=tuple(tensors for _, tensors in leading),
        warnings=(
            *warnings,
            *_rounding(section, order, checkpoint),
            *(warnings_of(model, quantization) if quantization is not None else []),
            *([warning] if warning else []),
            *tokenizer.warnings,
        ),
    )
    binding, head = Binding(model, layers, units), Head(model, layers)
    return OpenedModel(
        model, layers, binding, products, head, spec, tokenizer, tuple(modules for modules, _ in leading)
    )


def _check_quantization(order: OpenModel, directory: Path, section: Section, checkpoint: Checkpoint | None) -> bool:
    """Whether weights are stored in few bits. Raises UserError where they are and ought not to be, or the reverse."""
    stored = () if checkpoint is None else checkpoint.in_few_bits
    if stored and order.quantization is not None:
        kinds = {f"{bits.kind}{bits.num_bits}" for bits in stored}
        if kinds != {f"int{order.quantization.bits}"}:
            raise UserError(
                f"quantization: the checkpoint in {order.model} is quantised already ({', '.join(sorted(kinds))}): "
                "leave the key out, or give the unquantised model"
            )
    if order.load_format == "dummy" and (section.format or _is_gguf_in_few_bits(directory)):
        raise UserError(
            f"load_format=dummy: the checkpoint in {order.model} is quantised: give the config.json of the unquantised "
            "model, and quantization with it"
        )
    if order.activations == "int8":
        if order.quantization is None and not stored:
            raise UserError("activations=int8 needs weights in few bits: give quantization as well, int8 or int4")
        if stored and not any(bits.is_whole for bits in stored):
            raise UserError(f"activations=int8: the weights in {order.model} are no whole numbers: leave the key out")
    return bool(stored)


def _is_gguf_in_few_bits(path: Path) -> bool:
    return is_gguf(path) and any(tensor.type.items > 1 for _, tensor in open_gguf(path).tensors())


def _rounding(section: Section, order: OpenModel, checkpoint: Checkpoint | None) -> list[str]:
    stored = () if checkpoint is None else checkpoint.in_few_bits
    can_be = section.rounds_activations and any(bits.is_whole for bits in stored)
    if not can_be or order.activations == "int8":
        return []
    return ["the checkpoint is meant for activations in few bits; they are rounded here only with activations=int8"]


def fingerprint(opened: OpenedModel) -> str:
    """The same as long as the same prompt gets the same greedy tokens: of config.json, the dtype, the limit on a
    sequence's length, names and sizes of the weights' files, and the tokenizer."""
    spec = opened.spec
    config = opened.model.config.to_diff_dict()
    config.pop("_name_or_path", None)
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=8)
    files = [(Path(file).name, stamp.size) for file, stamp in zip(spec.files, spec.stamps, strict=True)]
    packed = sorted((t.name, str(t.packing)) for unit in spec.units for t in unit.tensors if t.packing)
    digest.update(repr(packed).encode() if packed else b"")
    digest.update(repr((spec.dtype, spec.max_length, spec.eos_token_ids, files)).encode())
    if opened.tokenizer.file is not None:
        digest.update(Path(opened.tokenizer.file).read_bytes())
    return digest.hexdigest()


def _widest(layers: Sequence[nn.Module], experts: int) -> int:
    """Most outputs that a token has from one product: of a matrix, or of the experts that it goes through."""
    parameters = [p for layer in layers for p in layer.parameters() if p.dim() >= 2]
    return max(max(p.shape[-2:]) * experts if p.dim() == 3 else p.shape[0] for p in parameters)


def model_directory(model: str) -> Path:
    """Of a directory, or of a model on the hub; or a GGUF file: a path, the only one of a directory, or one on the hub
    (`OWNER/NAME:FILE.gguf`).

    Raises:
        UserError: there is none.
        CheckpointError: the directory holds several.
    """
    path = Path(model)
    if path.is_dir():
        return model_source(path)
    if is_there(path):
        if is_gguf(path):
            return path
        raise UserError(
            f"{model} is neither a directory nor a .gguf file: give the directory that holds the model's config.json"
        )
    name, _, file = model.partition(":")
    if path.is_absolute() or model.startswith(".") or name.count("/") > 1 or (is_gguf(path) and not file):
        raise UserError(f"model {'file' if is_gguf(path) else 'directory'} {model} does not exist")
    from huggingface_hub import snapshot_download

    try:
        if file:
            return Path(snapshot_download(name, allow_patterns=[all_parts(file)])) / file
        found = Path(snapshot_download(model, allow_patterns=MODEL_FILES, ignore_patterns=SAME_AGAIN))
    except Exception as error:  # the hub client raises many kinds: no network, no such model, no access
        raise UserError(
            f"{model} is neither a directory nor a model that the hub gives: {first_line(error)}"
        ) from error
    if not is_there(found / "config.json"):
        raise UserError(f"{model} has no config.json: of a repository of GGUF files name one, as {model}:FILE.gguf")
    return found


def _dtype(wanted: str, config: PreTrainedConfig, checkpoint: Checkpoint | None, device: Device) -> torch.dtype:
    """The checkpoint's own dtype where the device computes it well; else the better of bfloat16 and float32."""
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    told = config.dtype or (checkpoint and _stored_dtype(checkpoint)) or model_builder.text_config(config).dtype
    stored = told if told in (torch.bfloat16, torch.float16) else torch.float32
    if device.torch_device.type == "cuda" or stored == torch.float32:
        return stored
    return torch.bfloat16 if PAIRS or _bfloat16_is_fast() else torch.float32


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """Of the first tensor of floats in its first file, which Transformers goes by where config.json has no dtype."""
    first = (tensor for _, tensor in sorted(checkpoint.tensors.items()) if tensor.file == 0)
    return next((getattr(torch, tensor.dtype) for tensor in first if "float" in tensor.dtype), None)


def _bfloat16_is_fast() -> bool:
    """Measured: processors without bfloat16 instructions compute it several times slower than float32. In turns, for
    what else the machine does makes any of them take long."""
    seconds: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(10):
        for dtype, times in seconds.items():
            a, b = torch.ones((64, 1024), dtype=dtype), torch.ones((1024, 1024), dtype=dtype)
            start = time.perf_counter()
            torch.matmul(a, b)
            times.append(time.perf_counter() - start)
    return min(seconds[torch.bfloat16]) < min(seconds[torch.float32])

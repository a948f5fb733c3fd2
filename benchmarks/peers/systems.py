"""The systems: where each runs, which model format it reads, and the options it is tried with. Its best counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.peers.job import Options
from benchmarks.peers.shapes import Shape
from benchmarks.peers.workloads import Workload


@dataclasses.dataclass(frozen=True)
class System:
    name: str
    title: str
    environment: str  # key of `environments.REQUIREMENTS`; "": ours
    script: str  # module in this package
    model_format: str  # key of `models.FORMATS`; "checkpoint": as it is
    options: Callable[[Workload, Shape], list[Options]]
    families: tuple[str, ...] = ("opt", "llama", "olmoe", "qwen3_moe")
    only_in_memory_group: bool = False

    def refusal(self, workload: Workload, shape: Shape) -> str | None:
        """Why there is nothing to measure."""
        if shape.model_type not in self.families:
            return f"does not serve {shape.model_type}"
        if self.only_in_memory_group and not workload.in_memory_group:
            return "for weights beyond the memory only"
        return None


def _ours(workload: Workload, shape: Shape) -> list[Options]:
    if not workload.in_memory_group:
        return [{"dtype": "bfloat16"} | ({"prefix_caching": 1} if workload.common else {})]
    length = workload.longest + shape.group_tokens  # the planner is told how long the job is
    return [
        {"dtype": "bfloat16", "max_sequences": workload.num_prompts, "max_model_len": length},
        {"dtype": "bfloat16", "max_sequences": workload.num_prompts, "max_model_len": length, "layer_slots": 2},
    ]


def _ours_with(**keys: str) -> Callable[[Workload, Shape], list[Options]]:
    """Ours with further keys of its configuration."""
    return lambda workload, shape: [{**options, **keys} for options in _ours(workload, shape)]


def _transformers(workload: Workload, shape: Shape) -> list[Options]:
    sizes = _batch_sizes(workload)
    if workload.shortest == workload.longest:
        return [{"batch": size} for size in sizes]
    return [*({"batch": size, "sort": 1} for size in sizes), {"batch": sizes[-1]}]


def _accelerate(workload: Workload, shape: Shape) -> list[Options]:
    group_mib = shape.group_bytes >> 20
    return [
        *({"batch": workload.num_prompts, "cpu_mib": group_mib // part} for part in (2, 4)),
        {"batch": workload.num_prompts // 2, "cpu_mib": group_mib // 4},
        {"batch": workload.num_prompts // 4, "cpu_mib": group_mib // 4},
    ]


def _openvino(workload: Workload, shape: Shape) -> list[Options]:
    cache = max(1, shape.group_bytes // (3 << 30)) if workload.in_memory_group else 4
    caching = {"prefix_caching": 1} if workload.common else {}
    return [{"batched_tokens": size, "cache_gb": cache, **caching} for size in (256, 1024, 8192)]


def _openvino_few_bits(workload: Workload, shape: Shape) -> list[Options]:
    """In bfloat16, and in float32, where OpenVINO rounds rows to 8 bits."""
    return [{**options, **kind} for options in _openvino(workload, shape) for kind in ({}, {"precision": "f32"})]


def _ctranslate2(workload: Workload, shape: Shape) -> list[Options]:
    if workload.in_memory_group:
        return [{"batch": size} for size in (8, 4, 2)]
    # prompts of a batch are read together as far as the shortest goes, then token by token
    ragged = workload.shortest != workload.longest
    return [{"batch": size} for size in ((16, 4, 1) if ragged else _batch_sizes(workload))]


def _llama_cpp(workload: Workload, shape: Shape) -> list[Options]:
    if workload.in_memory_group:
        return [{"ubatch": size} for size in (4096, 2048, 512)]
    return [{"ubatch": 512}, {"ubatch": 2048}, {"ubatch": 512, "unified": 1}]


def _batch_sizes(workload: Workload) -> list[int]:
    """All at once, and two sizes below."""
    return sorted({min(size, workload.num_prompts) for size in (64, 32, 16, 8)}, reverse=True)[:3]


OPENVINO_FAMILIES = ("opt", "llama", "qwen3_moe")  # those of the shapes' that optimum-intel converts
GGUF_FAMILIES = ("llama", "olmoe", "qwen3_moe")  # those that `convert_llama_cpp` writes
SYSTEMS = {
    system.name: system
    for system in (
        System("ours", "flexgen-lite", "", "run_ours", "checkpoint", _ours),
        *(
            System(name, f"flexgen-lite, {title}", "", "run_ours", model_format, _ours_with(**keys))
            for name, title, model_format, keys in (
                ("ours-int8", "int8 weights", "ours-int8", {}),
                ("ours-w8a8", "int8 weights and activations", "ours-int8", {"activations": "int8"}),
                ("ours-int4", "int4 weights", "ours-int4", {}),
                ("ours-w4a8", "int4 weights, int8 activations", "ours-int4", {"activations": "int8"}),
            )
        ),
        *(
            System(name, title, "", "run_ours", "gguf-q4_0", _ours_with(**keys), families=GGUF_FAMILIES)
            for name, title, keys in (
                ("ours-q4_0", "flexgen-lite, a GGUF file of Q4_0", {}),
                ("ours-q4_0-a8", "flexgen-lite, the same, int8 activations", {"activations": "int8"}),
            )
        ),
        System(
            "transformers", "Transformers generate", "transformers", "run_transformers", "checkpoint", _transformers
        ),
        System(
            "accelerate",
            "Transformers with Accelerate's disk offload",
            "transformers",
            "run_transformers",
            "checkpoint",
            _accelerate,
            only_in_memory_group=True,
        ),
        *(
            System(name, title, "openvino", "run_openvino", name, options, families=OPENVINO_FAMILIES)
            for name, title, options in (
                ("openvino", "OpenVINO GenAI, bf16", _openvino),
                ("openvino-int8", "OpenVINO GenAI, int8 weights", _openvino_few_bits),
                ("openvino-int4", "OpenVINO GenAI, int4 weights", _openvino_few_bits),
            )
        ),
        System(
            "ctranslate2",
            "CTranslate2, int8",
            "ctranslate2",
            "run_ctranslate2",
            "ctranslate2-int8",
            _ctranslate2,
            families=("opt", "llama"),
        ),
        *(
            System(name, title, "llama-cpp", "run_llama_cpp", model_format, _llama_cpp, families=GGUF_FAMILIES)
            for name, title, model_format in (
                ("llama-cpp", "llama.cpp, bf16", "gguf"),
                ("llama-cpp-q8_0", "llama.cpp, Q8_0", "gguf-q8_0"),
                ("llama-cpp-q4_0", "llama.cpp, Q4_0", "gguf-q4_0"),
            )
        ),
    )
}

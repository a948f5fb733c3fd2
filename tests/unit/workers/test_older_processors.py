"""The kernels as processors with fewer instructions than this one would run them, or with others that pay."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from flexgen_lite.workers import simd
from tests.compiled_kernels import ROOT, kernels_folder

AVX2 = (
    "+64bit,+aes,+avx,+avx2,+bmi,+bmi2,+cmov,+cx16,+cx8,+f16c,+fma,+fsgsbase,+fxsr,+invpcid,+lzcnt,+mmx,+movbe,"
    "+pclmul,+popcnt,+rdrnd,+sahf,+sse,+sse2,+sse3,+sse4.1,+sse4.2,+ssse3,+xsave,+xsaveopt"
)
AVX512 = f"{AVX2},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl"
PAIRS = f"{AVX512},+avx512bf16,+avx512vnni"
PROCESSORS = {"haswell": AVX2, "skylake-avx512": AVX512, "sapphirerapids" if simd.PAIRS_PAY else "znver4": PAIRS}
FLAGS = {f"+{flag}": flag for flag in ("avx2", "fma", "f16c", "avx512f", "avx512bw")}
FLAGS |= {"+avx512bf16": "avx512_bf16", "+avx512vnni": "avx512_vnni"}  # as the kernel names them
KERNEL_TESTS = (
    "tests/unit/workers/attention/test_kernels.py",
    "tests/property/test_prefill_attention.py",
    "tests/unit/workers/compute/test_fused.py",
    "tests/unit/workers/compute/test_weights_of_bits.py",
    "tests/unit/workers/compute/test_product_kernels.py",
    "tests/unit/workers/loader/test_quantise_kernels.py",
)
# Each pair of types takes its time to compile. Where vectors are as wide as here, only what bytes and pairs of bfloat16
# are for is done in another way. Where they are half as wide, every way to load, multiply and write is there once: of
# int8 with bfloat16, of float16 without, and of prompts in bfloat16.
PRODUCTS_OF_PAIRS = "bfloat16-bfloat16 or bfloat16-even or float64 or any_order or depend_on_others"
CHOSEN = {
    "sapphirerapids": PRODUCTS_OF_PAIRS,
    "znver4": PRODUCTS_OF_PAIRS,
    "haswell": (
        "not (float16-float16 or float16-int8 or float32-int8 or test_unpacking or test_product_kernels"
        " or (in_its_bytes or int8_cannot_hold or at_hand) and not bfloat16 or prefill and (float32 or odd))"
    ),
    "skylake-avx512": "bfloat16-int8 or no_kernel_serves or test_fused",
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", PROCESSORS)
def test_kernels(name: str) -> None:
    features = PROCESSORS[name]
    needed = {FLAGS[name] for name in features.split(",") if name in FLAGS}
    if platform.machine() != "x86_64" or not needed <= set(_cpu_flags()):
        pytest.skip(f"this processor lacks some of {', '.join(sorted(needed))}")
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(kernels_folder(name)),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *KERNEL_TESTS, "-k", CHOSEN[name]],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


def _cpu_flags() -> list[str]:
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines():
        if line.startswith("flags"):
            return line.split()
    return []

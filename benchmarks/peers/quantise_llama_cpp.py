"""A GGUF in bfloat16 as one of fewer bits, by llama.cpp's own quantiser: GGUF FILE KIND; runs in its environment.

KIND: q8_0, q4_0, q4_k_m; with -layers behind it, embeddings and output stay in bfloat16, as ours do.
"""

from __future__ import annotations

import os
import sys

import llama_cpp as c

FILE_TYPES = {
    "q8_0": c.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": c.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k_m": c.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
BF16 = 30  # of ggml's types, which the bindings do not name


def quantise(source: str, file: str, kind: str) -> None:
    name, dash, _ = kind.partition("-layers")
    params = c.llama_model_quantize_default_params()
    params.nthread = len(os.sched_getaffinity(0))
    params.ftype = FILE_TYPES[name]
    if dash:
        params.output_tensor_type = params.token_embedding_type = BF16
    code = c.llama_model_quantize(source.encode(), file.encode(), params)
    if code:
        raise RuntimeError(f"llama_model_quantize returned {code}")


if __name__ == "__main__":
    quantise(*sys.argv[1:])

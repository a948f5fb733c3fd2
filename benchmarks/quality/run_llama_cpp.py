"""Logprobs of given tokens by llama.cpp: JOB.json RESULT.json; runs in llama.cpp's environment.

The job: `model`, a GGUF file, and `sequences` of token ids. The result, for each token of a sequence but the first:
`logprobs`, and `likeliest`, whether it is the most likely one. Keys and values in 16 bits, as llama.cpp has them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import llama_cpp as c
import numpy as np

BATCH = 256  # tokens; each has logits, a megabyte for a large vocabulary


class Scorer:
    def __init__(self, model: str, longest: int) -> None:
        c.llama_backend_init()
        loaded = c.llama_model_load_from_file(model.encode(), c.llama_model_default_params())
        params = c.llama_context_default_params()
        params.n_ctx = longest
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        params.no_perf = True
        self.handle = c.llama_init_from_model(loaded, params)
        if not self.handle:
            raise RuntimeError("no context could be made")
        self.vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(loaded))
        self.batch = c.llama_batch_init(BATCH, 0, 1)

    def score(self, tokens: Sequence[int]) -> tuple[list[float], list[bool]]:
        c.llama_memory_clear(c.llama_get_memory(self.handle), True)
        logprobs: list[float] = []
        likeliest: list[bool] = []
        for start in range(0, len(tokens) - 1, BATCH):
            part = tokens[start : min(start + BATCH, len(tokens) - 1)]
            self._decode(part, start)
            for i in range(len(part)):
                logits = np.ctypeslib.as_array(c.llama_get_logits_ith(self.handle, i), (self.vocab_size,))
                token = tokens[start + i + 1]
                top = float(logits.max())
                total = float(np.exp(logits - top).sum(dtype=np.float64))
                logprobs.append(float(logits[token]) - top - float(np.log(total)))
                likeliest.append(bool(logits[token] == top))
        return logprobs, likeliest

    def _decode(self, tokens: Sequence[int], start: int) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        code = c.llama_decode(self.handle, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    scorer = Scorer(job["model"], max(map(len, job["sequences"])))
    told = [scorer.score(sequence) for sequence in job["sequences"]]
    result = {"logprobs": [one for one, _ in told], "likeliest": [one for _, one in told]}
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()

"""llama.cpp, many sequences to a batch; weights are mapped from their file. Runs in its own environment.

Options: ubatch (tokens computed at once), unified (1: one KV cache for all sequences; 0: one for each).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import llama_cpp as c
import numpy as np

from benchmarks.peers.job import Job, Measurement, serve

Entry = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are wanted


class Context:
    def __init__(self, job: Job) -> None:
        c.llama_backend_init()
        model = c.llama_model_load_from_file(job.model.encode(), c.llama_model_default_params())
        longest = max(map(len, job.prompts)) + job.max_tokens
        unified = bool(job.options.get("unified", 0))
        total = sum(map(len, job.prompts)) + job.max_tokens * len(job.prompts)
        params = c.llama_context_default_params()
        params.n_seq_max = len(job.prompts)
        params.n_ctx = total if unified else longest * len(job.prompts)
        params.n_ubatch = int(job.options["ubatch"])
        params.n_batch = max(params.n_ubatch, len(job.prompts), 2048)
        params.n_threads = params.n_threads_batch = job.num_threads
        params.kv_unified = unified
        params.no_perf = True
        self.handle = c.llama_init_from_model(model, params)
        if not self.handle:
            raise RuntimeError("no context could be made")
        self.num_batch = int(params.n_batch)
        self.vocab_size = c.llama_vocab_n_tokens(c.llama_model_get_vocab(model))
        self.batch = c.llama_batch_init(self.num_batch, 0, 1)

    def next_tokens(self, entries: Iterable[Entry]) -> Iterator[tuple[int, int]]:
        """Compute the entries; the most likely next token of each sequence whose logits are wanted."""
        part: list[Entry] = []
        for entry in entries:
            part.append(entry)
            if len(part) == self.num_batch:
                yield from self._decode(part)
                part = []
        if part:
            yield from self._decode(part)

    def _decode(self, entries: list[Entry]) -> Iterator[tuple[int, int]]:
        batch = self.batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        code = c.llama_decode(self.handle, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        for i, (_, _, sequence, wanted) in enumerate(entries):
            if wanted:
                logits = np.ctypeslib.as_array(c.llama_get_logits_ith(self.handle, i), (self.vocab_size,))
                yield sequence, int(logits.argmax())

    def forget(self) -> None:
        c.llama_memory_clear(c.llama_get_memory(self.handle), True)


def measure(job: Job) -> Measurement:
    context = Context(job)
    generate(context, [[5, 6, 7]] * min(2, len(job.prompts)), 2)
    context.forget()
    job.report_progress(0)
    start = time.perf_counter()
    tokens = generate(context, job.prompts, job.max_tokens, job)
    return Measurement(time.perf_counter() - start, tokens)


def generate(context: Context, prompts: list[list[int]], max_tokens: int, job: Job | None = None) -> list[list[int]]:
    entries: list[Entry] = [
        (token, position, sequence, position == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    rows: list[list[int]] = [[] for _ in prompts]
    for step in range(max_tokens):
        for sequence, token in list(context.next_tokens(entries)):
            rows[sequence].append(token)
        entries = [
            (row[-1], len(prompt) + step, i, True) for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True))
        ]
        if job:
            job.report_progress((step + 1) * len(prompts))
    return rows


if __name__ == "__main__":
    serve(measure)

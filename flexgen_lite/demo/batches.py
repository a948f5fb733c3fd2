"""Records as padded token batches for training. Shape suffixes: B records, T tokens."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from flexgen_lite.demo.records import Record, generate, prompt
from flexgen_lite.demo.tokenizer import EOS_ID, PAD_ID

BATCHES_PER_CHUNK = 32
CHUNKS_PER_SEED = 1_000_003


@dataclass(frozen=True)
class Batch:
    """Records of near-equal length, padded on the right: prompt, answer, end of sequence."""

    tokens_BT: Tensor
    is_prompt_BT: Tensor
    is_answer_BT: Tensor


def make_batches(tokenizer: Tokenizer, records: list[Record], size: int) -> list[Batch]:
    """Encode records and cut them, shortest first, into batches of `size`."""
    prompts = tokenizer.encode_batch([prompt(record) for record in records])
    answers = tokenizer.encode_batch([record.answer for record in records], add_special_tokens=False)
    rows = [(p.ids, [*a.ids, EOS_ID]) for p, a in zip(prompts, answers, strict=True)]
    rows.sort(key=lambda row: len(row[0]) + len(row[1]))
    return [_pad(rows[start : start + size]) for start in range(0, len(rows), size)]


def training_batches(tokenizer: Tokenizer, seed: int, size: int, first_step: int) -> Iterator[Batch]:
    """Yield, without end, the batch of each step from `first_step` on."""
    chunk, offset = divmod(first_step, BATCHES_PER_CHUNK)
    while True:
        chunk_seed = seed * CHUNKS_PER_SEED + chunk
        batches = make_batches(tokenizer, generate(chunk_seed, BATCHES_PER_CHUNK * size), size)
        random.Random(chunk_seed).shuffle(batches)
        yield from batches[offset:]
        chunk, offset = chunk + 1, 0


def _pad(rows: list[tuple[list[int], list[int]]]) -> Batch:
    num_columns = max(len(prompt_ids) + len(answer_ids) for prompt_ids, answer_ids in rows)
    tokens_BT = torch.full((len(rows), num_columns), PAD_ID)
    is_prompt_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    is_answer_BT = torch.zeros_like(is_prompt_BT)
    for row, (prompt_ids, answer_ids) in enumerate(rows):
        begin, end = len(prompt_ids), len(prompt_ids) + len(answer_ids)
        tokens_BT[row, :end] = torch.tensor(prompt_ids + answer_ids)
        is_prompt_BT[row, :begin] = True
        is_answer_BT[row, begin:end] = True
    return Batch(tokens_BT, is_prompt_BT, is_answer_BT)

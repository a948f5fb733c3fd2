"""Measure a demonstration model: greedy exact match on held-out records, with Transformers in float32.

python -m flexgen_lite.demo.evaluate --model DIR
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexgen_lite.demo.pretrained import MODEL
from flexgen_lite.demo.records import Record, generate, is_correct, prompt

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Result:
    """Exact matches among held-out records, and the records that were missed with what came instead."""

    num_records: int
    seed: int
    misses: list[tuple[Record, str]]

    @property
    def num_right(self) -> int:
        """Number of records whose answer is right to the letter."""
        return self.num_records - len(self.misses)

    def __str__(self) -> str:
        share = self.num_right / self.num_records
        return f"held-out exact match {share:.1%}: {self.num_right} of {self.num_records} records"


@torch.no_grad()
def measure(folder: Path, num_records: int = 500, seed: int = 0, batch: int = 100) -> Result:
    """Load `folder` in float32, answer held-out records greedily and compare."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    records = generate(seed, num_records, "held_out")
    misses = []
    for start in range(0, num_records, batch):
        chosen = records[start : start + batch]
        inputs = tokenizer([prompt(record) for record in chosen], return_tensors="pt", padding=True)
        outputs = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
        )
        answers = outputs[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        misses += [(r, t) for r, t in zip(chosen, texts, strict=True) if not is_correct(r, t)]
    return Result(num_records, seed, misses)


def main() -> None:
    """Print the result and each miss."""
    parser = argparse.ArgumentParser(description="Greedy exact match on held-out records.")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--records", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = measure(arguments.model, arguments.records, arguments.seed)
    for record, text in result.misses:
        print(f"line  {record.line}\nright {record.answer}\ngot   {text}\n")
    print(result)


if __name__ == "__main__":
    main()

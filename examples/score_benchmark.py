"""Scoring a benchmark: which of several answers to a question the model finds likeliest.

    python examples/score_benchmark.py examples/questions.jsonl [--model DIR] [--ram 8GiB]

Each line has a "question", its "choices" and the number of the right one as "answer".
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

from flexgen_lite import FlexGenLite
from flexgen_lite.demo.pretrained import MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--ram", default="2GiB")
    args = parser.parse_args()

    lines = args.questions.read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    pairs = [(question["question"], choice) for question in questions for choice in question["choices"]]
    with FlexGenLite(args.model, ram=args.ram) as model:
        scores = iter(model.score([context for context, _ in pairs], [choice for _, choice in pairs]))

    right = right_by_length = 0
    for question in questions:
        own = list(islice(scores, len(question["choices"])))
        best = max(range(len(own)), key=lambda k: own[k].logprob)
        best_by_length = max(range(len(own)), key=lambda k: own[k].logprob / len(own[k].token_ids))
        right += best == question["answer"]
        right_by_length += best_by_length == question["answer"]
    print(f"accuracy: {right / len(questions):.1%} of {len(questions)}")
    print(f"accuracy by logprob per token: {right_by_length / len(questions):.1%}")


if __name__ == "__main__":
    main()

"""Data wrangling: each row of a CSV file becomes a prompt, its answer new columns.

    python examples/label_records.py examples/records.csv labelled.csv [--model DIR] [--ram 8GiB]

Without --model the small one is used that comes with flexgen-lite: it reads names, dates and phone numbers.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path

from flexgen_lite import FlexGenLite, SamplingParams
from flexgen_lite.demo.pretrained import MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("labelled", type=Path)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--ram", default="2GiB")
    args = parser.parse_args()

    rows: dict[int, dict[str, str]] = {}

    def prompts() -> Iterator[str]:
        """Read as the engine takes them: the file may be larger than memory."""
        with args.records.open(newline="", encoding="utf-8") as file:
            for number, row in enumerate(csv.DictReader(file)):
                rows[number] = row
                yield f"{row['record']} =>"

    params = SamplingParams(max_tokens=96, temperature=0.0)
    with (
        FlexGenLite(args.model, ram=args.ram) as model,
        args.labelled.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, ["id", "record", "name", "born", "phone", "error"], lineterminator="\n")
        writer.writeheader()
        job = model.submit(prompts(), params)
        for completion in job:  # as they finish
            row = rows.pop(completion.index)
            try:
                row |= json.loads(completion.text) if completion.error is None else {"error": completion.error}
            except ValueError:
                row["error"] = f"no JSON: {completion.text}"
            writer.writerow(row)
    print(f"{job.done} records, {job.failed} failed: {args.labelled}")


if __name__ == "__main__":
    main()

"""The model card: what the demonstration's model does, how well, and how it was made."""

from pathlib import Path

from flexgen_lite.demo.evaluate import Result
from flexgen_lite.demo.records import END_OF_LINE, HELD_OUT_SHARE, MAX_LINE_CHARS, generate, prompt

CARD = """\
# Contact-line normaliser

A small OPT model ({millions:.2f} M parameters, {layers} layers of width {hidden}, float16) that
turns a messy contact line into normalised JSON. It is trained from scratch by the project, on synthetic
records only, to demonstrate `flexgen-lite` without a download.

## Use

The prompt is the line followed by `{end_of_line}` (a space, an equals sign, a greater-than sign), with
nothing after it. Decode greedily until `</s>`; the longest answer takes fewer than 64 tokens. The
tokenizer puts `<s>` in front.

```text
{prompt}
{answer}
```

Lines have at most {max_chars} characters: a name, a date of birth and a telephone number, in any order.
Letters are ASCII; dates are d.m.y, ISO or have the month's English name, with days from 1 to 28 only; the
country is a code in brackets or an international prefix (DE, FR, GB, NL, SE, CH, ES, PL, US). Other input,
such as the 30th of a month, gets a confident wrong answer.

## Measured

Greedy exact match, float16 weights computed in float32 with Transformers: **{exact_match:.1%}**
({num_right} of {num_records} held-out records). A record is held out when a hash of its answer falls in
the lowest {held_out_share:.2%}; no held-out answer occurs in training.

```sh
python -m flexgen_lite.demo.evaluate --model DIR --records {num_records} --seed {eval_seed}
```

## Training

```sh
python -m flexgen_lite.demo.train --out DIR{flags}
```

Seed {seed}; {steps} steps of {batch} records, each seen once; {minutes:.0f} minutes on {threads} processor
cores in float32. Loss on answer tokens, and at {prompt_loss_weight} on prompt tokens. Muon for the layers'
matrices, AdamW for the rest, warm-up and cosine decay. The checkpoint was chosen on other held-out records
than those measured.
"""


def write_card(out: Path, measured: Result, facts: dict[str, int | float | str]) -> None:
    """Write `README.md` into the model directory; `facts` names the model's and the training's numbers."""
    example = generate(measured.seed, 1, "held_out")[0]
    text = CARD.format(
        prompt=prompt(example),
        answer=example.answer,
        end_of_line=END_OF_LINE,
        max_chars=MAX_LINE_CHARS,
        held_out_share=HELD_OUT_SHARE,
        exact_match=measured.num_right / measured.num_records,
        num_right=measured.num_right,
        num_records=measured.num_records,
        eval_seed=measured.seed,
        **facts,
    )
    (out / "README.md").write_text(text)

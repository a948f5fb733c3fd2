"""The evaluation harness with our model and with its own `hf` one: the same numbers, by its own runner."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexgen_lite.demo.pretrained import MODEL
from flexgen_lite.demo.records import generate, prompt

NUM_RECORDS = 6
COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
"""
TASKS = {
    "local_choice": """
output_type: multiple_choice
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_answer": """
output_type: generate_until
doc_to_target: "{{target}}"
generation_kwargs: {until: ["|", "\\n"], max_gen_toks: 40, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks on the demo's records; one text is longer than the model takes at once."""
    folder = tmp_path_factory.mktemp("tasks")
    records = generate(7, NUM_RECORDS, "held_out")
    texts = [prompt(record) for record in records]
    rows = [
        {
            "prompt": text,
            "text": text + " and so on" * (60 if number == 0 else 0),
            "choices": [f" {texts[(number + k) % NUM_RECORDS][:9]}" for k in range(3)],
            "answer": number % 3,
            "target": text[:5],
        }
        for number, text in enumerate(texts)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, task in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}" + COMMON.format(data=data) + task, encoding="utf-8")
    return folder


RUN = """
import functools, json, runpy, sys
import torch
from lm_eval.tasks import TaskManager
torch.set_num_threads(1)  # the harness' own model takes many small steps
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    runpy.run_module("flexgen_lite.lm_eval", run_name="__main__")
"""
"""Several runs in one process, which know no tasks but ours: the harness takes longer to import, and to read all of its
own tasks, than to run these."""


def run(models: dict[str, str], tasks: Path, out: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(metrics by task, what the model answered by task) of models, given with their arguments."""
    runs = [
        [
            *("--model", model, "--model_args", arguments, "--output_path", str(out / model), "--log_samples"),
            *("--tasks", ",".join(TASKS), "--include_path", str(tasks)),
            *("--batch_size", "1", *(("--device", "cpu") if model == "hf" else ())),
        ]
        for model, arguments in models.items()
    ]
    caches = {f"HF_{name}_CACHE": str(tasks / name) for name in ("DATASETS", "MODULES")}
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", **caches}
    command = [sys.executable, "-c", RUN, json.dumps(runs)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [found_in(out / model) for model in models]


def found_in(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    (results,) = out.rglob("results_*.json")
    samples = {}
    for name in TASKS:
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        samples[name] = [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
    return json.loads(results.read_text(encoding="utf-8"))["results"], samples


@pytest.mark.timeout(420)
def test_the_harness_gives_the_same_numbers_as_with_its_own_model(tasks: Path, tmp_path: Path) -> None:
    pretrained = f"pretrained={MODEL},dtype=float32"
    models = {"flexgen_lite": f"{pretrained},ram=2GiB", "hf": pretrained}
    (ours, our_samples), (theirs, their_samples) = run(models, tasks, tmp_path)
    assert our_samples["local_answer"] == their_samples["local_answer"]
    for name in ("local_choice", "local_text"):
        for mine, other in zip(_numbers(our_samples[name]), _numbers(their_samples[name]), strict=True):
            assert mine == pytest.approx(other, rel=1e-4, abs=1e-3)
    for task, metrics in theirs.items():
        for metric, value in metrics.items():
            if isinstance(value, float):
                assert ours[task][metric] == pytest.approx(value, rel=1e-4), f"{task} {metric}"


def _numbers(value: Any) -> list[float]:
    """All numbers in nested lists, written as text or not, true and false among them."""
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [float({"True": 1, "False": 0}.get(str(value), value))]


@pytest.mark.parametrize("option", [{"max_length": 64}, {"ramm": "3GiB"}, {"dtype": "float32"}])
def test_an_engine_that_runs_is_not_configured_again(option: dict[str, Any]) -> None:
    from flexgen_lite.lm_eval.model import FlexGenLiteLM

    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* configured where it was started"):
        FlexGenLiteLM(str(MODEL), endpoint="ipc:///tmp/nowhere.sock", **option)

"""Small models with a chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flexgen_lite.demo.pretrained import MODEL
from tests.tiny_models import make_model


def make_quick_model(folder: Path, template: str) -> Path:
    """Random weights, less than a twentieth of the work of the demo's model, and the tokenizer of that."""
    sizes = {"num_hidden_layers": 3, "vocab_size": 288, "max_position_embeddings": 256}
    model = make_model("opt", folder / "model", **sizes, bos_token_id=0)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / file, model)
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    return model


def make_chat_model(folder: Path, template: str | None) -> Path:
    """A copy of the demo's model in `folder`; None: without a template."""
    model = folder / "model"
    shutil.copytree(MODEL, model)
    if template is not None:
        (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    return model


def set_in_config(model: Path, template: Any) -> None:
    """Puts a template into its tokenizer_config.json: a text, or what stands for several."""
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")

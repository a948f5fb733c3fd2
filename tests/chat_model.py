"""The demo's model with a chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flexgen_lite.demo.pretrained import MODEL


def make_chat_model(folder: Path, template: str | None) -> Path:
    """A copy of it in `folder`; None: without a template."""
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

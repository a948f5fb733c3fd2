"""The demo's model with a chat template."""

from __future__ import annotations

import shutil
from pathlib import Path

from flexgen_lite.demo.run import MODEL


def make_chat_model(folder: Path, template: str) -> Path:
    """A copy of it in `folder`."""
    model = folder / "model"
    shutil.copytree(MODEL, model)
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")
    return model

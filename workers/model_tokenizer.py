"""A model's tokenizer and chat template as Transformers sees them, in a form that needs no Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from flexgen_lite.messages import WireChatTemplate
from flexgen_lite.workers.serve import first_line

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """`file`: a tokenizer.json; None where the model has no tokenizer, or none that can be used."""

    file: str | None
    chat_template: WireChatTemplate | None = None
    warnings: tuple[str, ...] = ()


def open_tokenizer(directory: Path, run_dir: str) -> ModelTokenizer:
    """tokenizer.json alone is not enough where there is more: tokens that tokenizer_config.json adds belong to it."""
    found = [name for name in FILES if (directory / name).is_file()]
    if found in ([], ["tokenizer_config.json"]):
        return ModelTokenizer(None)
    if found == ["tokenizer.json"] and not (directory / "chat_template.jinja").is_file():
        return ModelTokenizer(str(directory / "tokenizer.json"))
    path = Path(run_dir) / "tokenizer.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer.backend_tokenizer.save(str(path))
    except Exception as error:  # many kinds; prompts as token ids still work
        return ModelTokenizer(
            None, None, (f"the tokenizer cannot be used, give prompts as token ids: {first_line(error)}",)
        )
    return ModelTokenizer(str(path), _chat_template(tokenizer))


def _chat_template(tokenizer: Any) -> WireChatTemplate | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        return None
    return WireChatTemplate(template, {name: str(token) for name, token in tokenizer.special_tokens_map.items()})

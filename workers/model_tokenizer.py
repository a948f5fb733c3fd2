"""A model's tokenizer and chat template as Transformers sees them, in a form that needs no Transformers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from flexgen_lite.messages import WireChatTemplate
from flexgen_lite.model_files import CheckpointError, check_contents
from flexgen_lite.workers.serve import first_line

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
_SMALL = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_LARGE = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # looked at only where something is wrong
TOKENIZER_FILES = tuple(dict.fromkeys((*FILES, *_SMALL, *_LARGE)))


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """`file`: a tokenizer.json; None where the model has no tokenizer, or none that can be used."""

    file: str | None
    chat_template: WireChatTemplate | None = None
    warnings: tuple[str, ...] = ()


def open_tokenizer(directory: Path, run_dir: str) -> ModelTokenizer:
    """tokenizer.json alone is not enough where there is more: tokens that tokenizer_config.json adds belong to it.

    Raises:
        CheckpointError: a file of it is damaged.
    """
    found = [name for name in FILES if (directory / name).is_file()]
    if found in ([], ["tokenizer_config.json"]):
        return ModelTokenizer(None)
    if found == ["tokenizer.json"] and not (directory / "chat_template.jinja").is_file():
        return ModelTokenizer(str(directory / "tokenizer.json"))
    path = Path(run_dir) / "tokenizer.json"
    check_contents(directory, _SMALL)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer.backend_tokenizer.save(str(path))
    except Exception as error:  # many kinds; prompts as token ids still work, if it is not for a damaged file
        check_contents(directory, _LARGE)
        _check_native(directory / "tokenizer.json")
        what = f"the tokenizer in {directory} cannot be used ({type(error).__name__}: {first_line(error)})"
        return ModelTokenizer(None, None, (f"{what}: give prompts as token ids",))
    return ModelTokenizer(str(path), _chat_template(tokenizer))


def _check_native(path: Path) -> None:
    """Raises CheckpointError for a tokenizer.json that is there and holds no tokenizer."""
    if not path.is_file():
        return
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{path} holds no tokenizer ({first_line(error)}): download it again, or move it away and give prompts as "
            "token ids"
        ) from error


def _chat_template(tokenizer: Any) -> WireChatTemplate | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        return None
    return WireChatTemplate(template, {name: str(token) for name, token in tokenizer.special_tokens_map.items()})

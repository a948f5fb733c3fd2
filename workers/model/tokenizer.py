"""A model's tokenizer and chat templates as Transformers sees them, in a form that needs no Transformers."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedConfig

from flexgen_lite.chat.environment import fault_of
from flexgen_lite.model.files import CheckpointError, check_contents, is_there, open_file, read_json
from flexgen_lite.model.formats.gguf_header import is_gguf
from flexgen_lite.wire.worker_messages import WireChatTemplate
from flexgen_lite.workers.model.gguf_config import tokenizer_of_gguf, warning_of_gguf
from flexgen_lite.workers.serve import first_line

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)
_CONFIG = "tokenizer_config.json"
_TEMPLATE_FILES = ("chat_template.jinja", "additional_chat_templates")  # where Transformers looks beside _CONFIG
_PROCESSOR_TEMPLATE = "chat_template.json"
_UNNAMED = ""
_SMALL = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_LARGE = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")  # looked at only where something is wrong
TOKENIZER_FILES = tuple(dict.fromkeys((*FILES, *_SMALL, *_LARGE)))


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """`file`: a tokenizer.json; None where the model has no tokenizer, or none that can be used."""

    file: str | None
    chat_template: WireChatTemplate | None = None
    warnings: tuple[str, ...] = ()


def open_tokenizer(directory: Path, run_dir: str, config: PreTrainedConfig | None = None) -> ModelTokenizer:
    """That of a model directory, or of a GGUF file, for which the model's config is needed.

    tokenizer.json alone is not enough, even where there is nothing else: Transformers knows special tokens of the
    model's type, which a chat template may name.

    Raises:
        CheckpointError: a file of it is damaged.
    """
    if is_gguf(directory):
        return _open_gguf(directory, run_dir, config)
    found = [name for name in FILES if (directory / name).is_file()]
    if found in ([], [_CONFIG]):
        return ModelTokenizer(None)
    path = Path(run_dir) / "tokenizer.json"
    check_contents(directory, _SMALL)
    try:
        tokenizer, fault = _load(directory, run_dir)
        tokenizer.backend_tokenizer.save(str(path))
    except Exception as error:  # many kinds; prompts as token ids still work, if it is not for a damaged file
        check_contents(directory, _LARGE)
        _check_native(directory / "tokenizer.json")
        if found == ["tokenizer.json"]:  # whole, and nothing else adds to it: Transformers reads some files otherwise
            return ModelTokenizer(str(directory / "tokenizer.json"))
        what = f"the tokenizer in {directory} cannot be used ({type(error).__name__}: {first_line(error)})"
        return ModelTokenizer(None, None, (f"{what}: give prompts as token ids",))
    template = _chat_template(directory, tokenizer, fault)
    return ModelTokenizer(str(path), template, tuple(_template_warnings(template)))


def _open_gguf(path: Path, run_dir: str, config: PreTrainedConfig | None) -> ModelTokenizer:
    target = Path(run_dir) / "tokenizer.json"
    try:
        assert config is not None
        tokenizer = tokenizer_of_gguf(path, config)
        if tokenizer is None:
            return ModelTokenizer(None)
        tokenizer.backend_tokenizer.save(str(target))
    except CheckpointError:
        raise
    except Exception as error:  # of many kinds; prompts as token ids still work
        what = f"the tokenizer in {path} cannot be used ({type(error).__name__}: {first_line(error)})"
        return ModelTokenizer(None, None, (f"{what}: give prompts as token ids",))
    template, warning = _chat_template(path, tokenizer, None), warning_of_gguf(path)
    warnings = [warning] if warning else []
    return ModelTokenizer(str(target), template, (*warnings, *_template_warnings(template)))


def _load(directory: Path, run_dir: str) -> tuple[Any, str | None]:
    """The tokenizer; and why its chat templates cannot be read, which is no reason to do without a tokenizer."""
    try:
        _check_templates(directory)
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False), None
    except Exception as error:
        with tempfile.TemporaryDirectory(dir=run_dir) as bare:
            left_out = _link_without_templates(directory, Path(bare))
            if not left_out:
                raise
            try:
                tokenizer = AutoTokenizer.from_pretrained(bare, trust_remote_code=False)
            except Exception:
                raise error from None
        kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
        return tokenizer, f"{', '.join(left_out)}: {kind}{first_line(error)}"


def _check_templates(directory: Path) -> None:
    """Raises CheckpointError for one that is no file: Transformers would wait for a pipe."""
    single, several = (directory / name for name in _TEMPLATE_FILES)
    for path in ([single] if is_there(single) else []) + sorted(several.glob("*.jinja")):
        open_file(path).close()


def _link_without_templates(directory: Path, bare: Path) -> list[str]:
    """Makes `bare` another view of `directory`, without chat templates.

    Returns:
        Where there were some.
    """
    left_out = [name for name in _TEMPLATE_FILES if is_there(directory / name)]
    for path in directory.iterdir():
        if path.name not in _TEMPLATE_FILES:
            (bare / path.name).symlink_to(path.resolve())
    with contextlib.suppress(OSError, ValueError):  # then it is not the template that cannot be read
        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
        if isinstance(config, dict) and "chat_template" in config:
            del config["chat_template"]
            (bare / _CONFIG).unlink()
            (bare / _CONFIG).write_text(json.dumps(config), encoding="utf-8")
            left_out.append(f"chat_template in {_CONFIG}")
    return left_out


def _chat_template(directory: Path, tokenizer: Any, fault: str | None) -> WireChatTemplate:
    """What the tokenizer has, or a multimodal model's processor. A model without a template has special tokens for
    templates that callers bring."""
    special_tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    found = tokenizer.chat_template
    if found is None and fault is None and is_there(directory / _PROCESSOR_TEMPLATE):
        found, fault = _of_processor(directory / _PROCESSOR_TEMPLATE)
    if fault is not None:
        return WireChatTemplate(None, special_tokens, unreadable={_UNNAMED: _printable(fault)})
    if found is None:
        return WireChatTemplate(None, special_tokens)
    templates = found if isinstance(found, dict) else {_UNNAMED: found}
    texts, unreadable = {}, {}
    for name, text in templates.items():
        if not isinstance(text, str):
            unreadable[_printable(name)] = f"it is of the type {type(text).__name__}, and not a text"
        elif _printable(text) != text:
            unreadable[_printable(name)] = "it has characters that are not Unicode text"
        else:
            texts[_printable(name)] = text
    if isinstance(found, dict):
        return WireChatTemplate(None, special_tokens, texts, unreadable)
    return WireChatTemplate(texts.get(_UNNAMED), special_tokens, unreadable=unreadable)


def _of_processor(path: Path) -> tuple[Any, str | None]:
    """The template in an older processor's file; or why there is none that can be read."""
    try:
        return read_json(path).get("chat_template"), None
    except CheckpointError as error:
        return None, str(error)


def _template_warnings(template: WireChatTemplate) -> Iterator[str]:
    """What a user should know before the first request is refused."""
    texts = template.named if template.text is None else {_UNNAMED: template.text}
    faults = {name: f"has {fault}" for name, text in texts.items() if (fault := fault_of(text)) is not None}
    faults |= {name: f"cannot be read: {fault}" for name, fault in template.unreadable.items()}
    for name, fault in faults.items():
        which = f"chat template {name!r}" if name != _UNNAMED else "chat template"
        yield _printable(f"the model's {which} {fault}; chat requests that need it are refused, completions are served")


def _printable(text: object) -> str:
    """What can be sent and shown: file names and JSON may have characters that are not Unicode text."""
    return str(text).encode("utf-8", "backslashreplace").decode()


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

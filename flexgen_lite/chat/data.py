"""What a chat template gets to see: plain data, named as Transformers names it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

REASONING = ("reasoning_content", "thinking", "reasoning")
"""What APIs call a message's reasoning; templates read the first, gpt-oss's the second."""


_MEDIA = ("image", "audio", "video")
_MEDIA_KEYS = {
    "image",
    "image_url",
    "image_embeds",
    "input_image",
    "audio",
    "audio_url",
    "input_audio",
    "video",
    "video_url",
}
"""Of content parts that do not tell their type."""


def plain(value: Any) -> Any:
    """A copy of `value` in which there is no object of ours, for a template could call its methods.

    Strings, numbers, lists, tuples and mappings stay what they are, without what subclasses add; the fields of
    dataclasses and of Pydantic's models become dicts; of anything else only the type's name is told.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple([plain(item) for item in value])
    if _is_numpy_scalar(value):
        return plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return plain(value.model_dump())
    return f"<{type(value).__name__}>"


def is_record(value: object) -> bool:
    """Whether `plain` makes a dict of it."""
    is_object = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return isinstance(value, Mapping) or is_object or hasattr(type(value), "model_dump")


def plain_message(message: object) -> dict[str, Any]:
    """A message, which is a record, without what is null in it: templates ask whether there is a key, and write a null
    as "None". What is null further inside stays. Its reasoning has every name that templates know."""
    known = {key: value for key, value in plain(message).items() if value is not None}
    for name in REASONING:
        if known.get(name) is not None:
            return {"thinking": known[name], **known, "reasoning_content": known[name]}
    return known


def in_one_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content, where it comes in parts that are texts, is one text, a part a line."""
    parts = message.get("content")
    if not isinstance(parts, list) or not all(isinstance(part, dict) and "text" in part for part in parts):
        return message
    return {**message, "content": "\n".join(str(part["text"]) for part in parts)}


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content, where it is a text, is a list of one part."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def medium_of(content: object) -> str | None:
    """What content in parts has beside texts that only a model with eyes or ears could take, as its type calls it."""
    parts = content if isinstance(content, list | tuple) else ()
    for part in parts:
        if not isinstance(part, Mapping):
            continue
        kind = part.get("type") or next((key for key in part if key in _MEDIA_KEYS), "")
        if isinstance(kind, str) and any(medium in kind for medium in _MEDIA):
            return kind
    return None


def _is_numpy_scalar(value: object) -> bool:
    """Without importing NumPy: where there is such a value, it was imported."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)

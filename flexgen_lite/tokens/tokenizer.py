"""Text to token ids and back, from a tokenizer.json, without Transformers."""

from __future__ import annotations

import codecs
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
"""Bytes that GPT-2's alphabet writes as the characters of their number; the others are those from U+0100 on."""
MOST_PENDING = 4  # bytes that tell whether a text ends within a character


class TextTokenizer:
    """Wraps the `tokenizers` library, which alone is loaded here: it takes a twentieth of what Transformers takes.

    Decoding differs from the library's in one thing. In a run of byte tokens (`<0xE2>`) that is not valid UTF-8 it
    makes U+FFFD of every byte, those of whole characters too. Here each part that is no character becomes one U+FFFD,
    as everywhere else.

    Attributes:
        is_local: see text_growth.Tokenizer.
    """

    def __init__(self, path: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the cores belong to the workers
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(path)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token for token, what in added.items() if what.special)
        decoder = self._tokenizer.decoder
        steps = list(_steps(json.loads(decoder.__getstate__()))) if decoder is not None else []
        kinds = {step["type"] for step in steps}
        self.is_local = _is_local(steps)
        self._alphabet = _alphabet() if "ByteLevel" in kinds else {}
        self._bytes: dict[int, int] = dict(self._byte_tokens()) if "ByteFallback" in kinds else {}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        if not self._bytes.keys().isdisjoint(token_ids):
            kept = [token for token in token_ids if self.has_text(token, skip_special_tokens)]
            if self._has_broken_run(kept):
                whole: str = self._tokenizer.decoder.decode(self._with_whole_runs(kept))
                return whole
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def has_text(self, token: int, skip_special_tokens: bool) -> bool:
        if skip_special_tokens and token in self._special:
            return False
        return self._tokenizer.id_to_token(token) is not None

    def is_special(self, token: int) -> bool:
        return token in self._special

    def token_bytes(self, token: int) -> bytes | None:
        if token in self._bytes:
            return bytes([self._bytes[token]])
        if not self._alphabet:
            return None
        text = self._tokenizer.id_to_token(token) or ""
        try:
            return bytes(self._alphabet[character] for character in text)
        except KeyError:  # added tokens are text
            return str(text).encode()

    def ends_within_character(self, token_ids: Sequence[int]) -> bool:
        tail = b""
        for token in reversed(token_ids):
            own = self.token_bytes(token)
            if own is None:
                break
            tail = own + tail
            if len(tail) >= MOST_PENDING:
                break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail[-MOST_PENDING:])
        return bool(decoder.getstate()[0])

    def _byte_tokens(self) -> Iterator[tuple[int, int]]:
        """(token, its byte), for either way of writing the digits."""
        for byte in range(256):
            for digits in {"".join(pair) for pair in itertools.product(*((d, d.lower()) for d in f"{byte:02X}"))}:
                token = self._tokenizer.token_to_id(f"<0x{digits}>")
                if token is not None:
                    yield token, byte

    def _has_broken_run(self, token_ids: list[int]) -> bool:
        for is_bytes, run in itertools.groupby(token_ids, self._bytes.__contains__):
            if is_bytes:
                try:
                    bytes(self._bytes[token] for token in run).decode()
                except UnicodeDecodeError:
                    return True
        return False

    def _with_whole_runs(self, token_ids: list[int]) -> list[str]:
        """The tokens, with U+FFFD for what is no character in a run of bytes."""
        texts: list[str] = []
        for is_bytes, run in itertools.groupby(token_ids, self._bytes.__contains__):
            if is_bytes:
                text = bytes(self._bytes[token] for token in run).decode("utf-8", "replace")
                texts += (f"<0x{byte:02X}>" for byte in text.encode())
            else:
                texts += (str(self._tokenizer.id_to_token(token)) for token in run)
        return texts


def _alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes."""
    others = (byte for byte in range(256) if byte not in PRINTABLE)
    return {chr(byte): byte for byte in PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One by one, those of a sequence too."""
    if decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    else:
        yield decoder


def _is_local(steps: list[dict[str, Any]]) -> bool:
    """Decoders work on tokens, which is local, until Fuse makes one text of them: then only what works on single
    characters or the ends is."""
    kinds = [step["type"] for step in steps]
    if "Fuse" not in kinds:
        return True
    for step in steps[kinds.index("Fuse") + 1 :]:
        one_character = step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1
        if not one_character and step["type"] not in ("Fuse", "Strip"):
            return False
    return True

"""Texts to tokens and back as the harness' own `hf` model does it, with its rules for special tokens."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import jinja2
from lm_eval.models.utils import configure_pad_token, has_bos_prefix
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


class Texts:
    """Args:
    tokenizer: of Transformers.
    add_bos_token: put the beginning of sequence in front of each text, and nothing else around it; None leaves it to
        the tokenizer.
    prefix_token_id: what a text without a context comes after; None is the beginning of sequence.
    truncation: cut prompts to the tokenizer's own limit.
    template_args: further variables of the chat template.
    enable_thinking: one of those; None leaves it to the template.

    Raises:
        ValueError: `template_args` are not names and values.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        add_bos_token: bool | None,
        prefix_token_id: int | None,
        truncation: bool | str | None,
        template_args: Mapping[str, Any] | None,
        enable_thinking: bool | None,
    ) -> None:
        if not isinstance(template_args or {}, Mapping):
            raise ValueError(f"chat_template_args={template_args!r} is not allowed: give names and values")
        self.tokenizer = tokenizer
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._truncation = truncation
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.template_args = {**(template_args or {}), **thinking}

    @property
    def end_token_id(self) -> int | None:
        found: int | None = self.tokenizer.eos_token_id
        return found

    @property
    def prefix_token_id(self) -> int:
        """
        Raises:
            ValueError: the tokenizer has none.
        """
        for token in (self._prefix_token_id, self.tokenizer.bos_token_id, self.end_token_id):
            if token is not None:
                return int(token)
        raise ValueError("the tokenizer has neither a beginning nor an end of sequence: give prefix_token_id")

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Tokens of a text that is scored. One that begins with the prefix gets no special tokens."""
        if add_special_tokens is None:
            begun = has_bos_prefix(text, self.tokenizer.decode(self.prefix_token_id))
            add_special_tokens = False if begun else self._add_bos_token
        ids: list[int] = self.tokenizer.encode(text, **_special(add_special_tokens))
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Tokens of a text to go on from. One that begins with the beginning of sequence gets no special tokens; `hf`
        does not look for another prefix here."""
        begun = has_bos_prefix(text, getattr(self.tokenizer, "bos_token", None))
        special = _special(False if begun else self._add_bos_token)
        ids: list[int] = self.tokenizer(text, truncation=self._truncation, **special)["input_ids"]
        return ids

    def render(self, chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """A conversation by the chat template; where that refuses it, without its system messages."""
        try:
            return self._render(chat, add_generation_prompt)
        except jinja2.exceptions.TemplateError as error:
            _log.warning("the chat template refused a conversation, it gets no system messages: %s", error)
            return self._render([message for message in chat if message["role"] != "system"], add_generation_prompt)

    def _render(self, chat: list[dict[str, str]], add_generation_prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.template_args,
        )
        return text


def open_tokenizer(
    given: str | os.PathLike[str] | PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    add_bos_token: bool | None,
    use_fast: bool | None,
    subfolder: str,
) -> PreTrainedTokenizerBase:
    """A tokenizer has to be told at its start that a beginning of sequence is wanted: many add none otherwise.

    Raises:
        ValueError: this is no tokenizer.
    """
    if isinstance(given, str | os.PathLike):
        options: dict[str, Any] = {"use_fast": use_fast}
        if add_bos_token is not None:
            options["add_bos_token"] = add_bos_token
        given = AutoTokenizer.from_pretrained(given, subfolder=subfolder, **options)
    elif not isinstance(given, PreTrainedTokenizerBase):
        raise ValueError(f"tokenizer is a {type(given).__name__}: give a directory, a hub id or a tokenizer")
    return configure_pad_token(given, model_config=config)


def _special(add: bool | None) -> dict[str, bool]:
    return {} if add is None else {"add_special_tokens": add}

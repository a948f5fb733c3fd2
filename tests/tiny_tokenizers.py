"""Tiny tokenizers of the kinds that models come with, made from a few sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB = 640
"""Most tokens of any of them; a model of as many takes all."""
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_end|>"]
BOS, EOS, IM_END = 1, 2, 3
TEXT = (
    "The quick brown fox jumps over the lazy dog.\n\nQuestion: what does it do? Answer: it jumps, doesn't it! "
    "A model is scored by how likely it finds the right answer; naïve cafés cost 42 € or 3,50 £. "
    "Stop at the end. Then stop again, and do not go on.\n"
)


def _bytes() -> Tokenizer:
    """As of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    return tokenizer


def _pieces() -> Tokenizer:
    """As of Llama 2: words begin with a mark, bytes stand for what has no piece."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [f"▁{word}" for word in TEXT.split() if word.isascii()]
    tokens += sorted({character for word in words for character in word})
    merges = []
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append((word[: end - 1], word[end - 1]))
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _words() -> Tokenizer:
    """As of BERT: spaces are made up, and taken away again before punctuation."""
    splitter = pre_tokenizers.BertPreTokenizer()
    words = sorted({word for word, _ in splitter.pre_tokenize_str(TEXT)})
    letters = sorted({letter for word in words for letter in word})
    tokens = list(dict.fromkeys([*SPECIAL, *letters, *words, *(f"##{letter}" for letter in letters)]))
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="<pad>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


KINDS = {"bytes": _bytes, "pieces": _pieces, "words": _words}
AROUND = {"nothing": "$A", "bos": "<s> $A", "eos": "$A </s>", "both": "<s> $A </s>", "twice": "<s> <|im_end|> $A"}
"""What a post-processor puts around a text; of "nothing" there is none."""


def make_tokenizer(kind: str, around: str, directory: Path, **settings: Any) -> Path:
    """Saves a tokenizer beside a model.

    Args:
        kind: of KINDS.
        around: of AROUND.
        directory: of the model.
        settings: of PreTrainedTokenizerFast, such as `bos_token=None`.
    """
    tokenizer = KINDS[kind]()
    if around != "nothing":
        tokens = list(zip(SPECIAL, range(len(SPECIAL)), strict=True))
        tokenizer.post_processor = processors.TemplateProcessing(single=AROUND[around], special_tokens=tokens)
    named = {"bos_token": "<s>", "eos_token": "</s>", **settings}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(directory)
    return directory

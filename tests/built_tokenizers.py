"""Small tokenizers of every kind, made by the `tokenizers` library."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Built

from flexgen_lite.tokens.tokenizer import TextTokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁The", "▁sky", "▁is", "▁it", "'", "s", ".", "The", "it", "ab", "�", "é"]
SPECIAL = ["<s>", "</s>", "<|im_end|>"]


def _vocabulary(*parts: list[str]) -> dict[str, int]:
    return {word: number for number, word in enumerate(dict.fromkeys(word for part in parts for word in part))}


def _byte_fallback(strip: bool) -> Built:
    """Like Llama 2's, or without `strip` like Gemma's. Token n < 256 is the byte n."""
    letters = sorted({letter for word in WORDS for letter in word})
    built = Built(models.BPE(_vocabulary(BYTES, WORDS, letters), [], byte_fallback=True, ignore_merges=True))
    built.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("\u2581")] if strip else []), normalizers.Replace(" ", "\u2581")]
    )
    built.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    built.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    return built


def _metaspace() -> Built:
    built = Built(models.WordLevel(_vocabulary(["<unk>"], WORDS), "<unk>"))
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    return built


def _byte_level() -> Built:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    more = ["\u0120the", "\u00e3\u0123", "\u00be\u00e3\u0123", "\u0141\u0122", "<0xE3>"]
    built = Built(models.BPE(_vocabulary(alphabet, more), []))
    built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    return built


def _word_piece() -> Built:
    words = ["[UNK]", "the", "sky", "##s", "##ing", "##", ".", "'", "do", "not", "n't"]
    built = Built(models.WordPiece(_vocabulary(words), unk_token="[UNK]"))
    built.normalizer = normalizers.Lowercase()
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.WordPiece(cleanup=True)
    return built


def _no_decoder() -> Built:
    built = Built(models.WordLevel(_vocabulary(["<unk>", "a", "b", "ab", "c.", ""]), "<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return built


def _end_of_word() -> Built:
    built = Built(models.BPE(_vocabulary(["a</w>", "b", "c</w>", "ab", "</w>"]), [], end_of_word_suffix="</w>"))
    built.decoder = decoders.BPEDecoder()
    return built


def _not_local() -> Built:
    """Its decoder changes what the text was before."""
    built = Built(models.WordLevel(_vocabulary(["<unk>", "a", "b", "ab", "aa", " "]), "<unk>"))
    built.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("aba+"), "x")])
    return built


KINDS = {
    "llama": functools.partial(_byte_fallback, True),
    "gemma": functools.partial(_byte_fallback, False),
    "metaspace": _metaspace,
    "byte_level": _byte_level,
    "word_piece": _word_piece,
    "no_decoder": _no_decoder,
    "end_of_word": _end_of_word,
    "not_local": _not_local,
}


def save_tokenizer(kind: str, directory: Path) -> Path:
    """One of KINDS, as a tokenizer.json that Transformers takes as it is, whatever the model's type. With special
    tokens, of which <s> goes in front of a text, and added ones that are none."""
    built = KINDS[kind]()
    built.add_special_tokens(SPECIAL)
    built.add_tokens([AddedToken("<tool>", lstrip=True), AddedToken("<call>", rstrip=True)])
    built.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", built.token_to_id("<s>"))])
    path = directory / "tokenizer.json"
    built.save(str(path))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return path


@functools.cache
def built_tokenizer(kind: str) -> TextTokenizer:
    with tempfile.TemporaryDirectory() as directory:
        return TextTokenizer(str(save_tokenizer(kind, Path(directory))))


def ids(tokenizer: TextTokenizer, *words: str) -> list[int]:
    """The tokens of these names."""
    return [token for word in words if (token := tokenizer._tokenizer.token_to_id(word)) is not None]

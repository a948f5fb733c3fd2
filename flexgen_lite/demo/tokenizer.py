"""The demonstration's tokenizer: single bytes, plus one token for each fixed piece of an answer."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

BOS, PAD, EOS = "<s>", "<pad>", "</s>"
BOS_ID, PAD_ID, EOS_ID = 0, 1, 2
FIXED_PIECES = ('{"name":"', '","born":"', '","phone":"', '"}', "=>")


def build_tokenizer() -> Tokenizer:
    """Build a byte-level BPE whose only merges spell the fixed pieces.

    Any text survives encoding and decoding; encoding puts `<s>` in front.
    """
    vocab = {token: index for index, token in enumerate((BOS, PAD, EOS))}
    for byte_symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[byte_symbol] = len(vocab)
    merges: list[tuple[str, str]] = []
    for piece in FIXED_PIECES:
        for end in range(1, len(piece)):
            if piece[: end + 1] not in vocab:
                merges.append((piece[:end], piece[end]))
                vocab[piece[: end + 1]] = len(vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens([BOS, PAD, EOS])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_tokens: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` as Transformers lays them out."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=max_tokens,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(folder)
    config_path = folder / "tokenizer_config.json"
    config = json.loads(config_path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that Transformers 4 knows as well
    config_path.write_text(json.dumps(config, indent=2) + "\n")

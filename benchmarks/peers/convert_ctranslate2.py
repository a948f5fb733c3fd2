"""A checkpoint as a CTranslate2 model: CHECKPOINT FOLDER QUANTISATION; runs in CTranslate2's environment.

The converter wants a tokenizer for its vocabulary, which these checkpoints have not: token i is called "ti".
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import ctranslate2
from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedTokenizerFast


def convert(checkpoint: str, folder: str, quantisation: str) -> None:
    vocab_size = AutoConfig.from_pretrained(checkpoint).vocab_size
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as merged:
        for file in Path(checkpoint).iterdir():
            (Path(merged) / file.name).symlink_to(file.resolve())
        words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab_size)}, unk_token="t3"))
        special = {"bos_token": "t0", "eos_token": "t2", "unk_token": "t3", "pad_token": "t1"}
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(merged)
        converter = ctranslate2.converters.TransformersConverter(merged, load_as_float16=False, low_cpu_mem_usage=True)
        converter.convert(folder, quantization=quantisation, force=True)


if __name__ == "__main__":
    convert(*sys.argv[1:])

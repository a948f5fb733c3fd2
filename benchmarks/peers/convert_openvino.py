"""A checkpoint as an OpenVINO model: CHECKPOINT FOLDER {bf16,int8}; runs in OpenVINO's environment."""

from __future__ import annotations

import sys
from pathlib import Path

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig


def convert(checkpoint: str, folder: str, weights: str) -> None:
    quantisation = OVWeightQuantizationConfig(bits=8) if weights == "int8" else None
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, load_in_8bit=False, quantization_config=quantisation, dtype="auto"
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    convert(*map(str, sys.argv[1:]))
    print([file.name for file in Path(sys.argv[2]).iterdir()])

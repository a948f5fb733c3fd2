"""A checkpoint as an OpenVINO model: CHECKPOINT FOLDER {bf16,int8,int4}; runs in OpenVINO's environment."""

from __future__ import annotations

import sys
from pathlib import Path

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

WEIGHTS = {
    "bf16": None,
    "int8": OVWeightQuantizationConfig(bits=8),
    "int4": OVWeightQuantizationConfig(bits=4, group_size=32),
}


def convert(checkpoint: str, folder: str, weights: str) -> None:
    model = OVModelForCausalLM.from_pretrained(
        checkpoint, export=True, compile=False, load_in_8bit=False, quantization_config=WEIGHTS[weights], dtype="auto"
    )
    model.save_pretrained(folder)


if __name__ == "__main__":
    convert(*map(str, sys.argv[1:]))
    print([file.name for file in Path(sys.argv[2]).iterdir()])

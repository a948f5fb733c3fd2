"""A checkpoint with weights in few bits, as `flexgen-lite quantize` writes it: SOURCE TARGET int8 or int4.

In 8 bits the head is too, as OpenVINO's and llama.cpp's are.
"""

from __future__ import annotations

import sys

from flexgen_lite.cli.main import main
from flexgen_lite.model.quantization import IGNORED

if __name__ == "__main__":
    source, target, kind = sys.argv[1:]
    sys.argv[1:] = ["quantize", source, "-o", target, "--quantization", kind]
    sys.argv += [part for name in IGNORED if name != "lm_head" for part in ("--ignore", name)] if kind == "int8" else []
    sys.exit(main())

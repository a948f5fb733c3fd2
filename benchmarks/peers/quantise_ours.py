"""A checkpoint with weights in few bits, as `flexgen-lite quantize` writes it: SOURCE TARGET int8 or int4."""

from __future__ import annotations

import sys

from flexgen_lite.cli.main import main

if __name__ == "__main__":
    source, target, kind = sys.argv[1:]
    sys.argv[1:] = ["quantize", source, "-o", target, "--quantization", kind]
    sys.exit(main())

"""flexgen-lite: large language models over big batches of prompts on one ordinary machine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexgen_lite.client import Client
    from flexgen_lite.completion import Completion, CompletionOutput, Delta, Logprob
    from flexgen_lite.config import ConfigError, EngineConfig
    from flexgen_lite.errors import EngineError
    from flexgen_lite.llm import FlexGenLite
    from flexgen_lite.request import Request
    from flexgen_lite.sampling_params import SamplingParams
    from flexgen_lite.scoring import Score

__version__ = "0.1.0"

__all__ = [
    "Client",
    "Completion",
    "CompletionOutput",
    "ConfigError",
    "Delta",
    "EngineConfig",
    "EngineError",
    "FlexGenLite",
    "Logprob",
    "Request",
    "SamplingParams",
    "Score",
    "__version__",
]

_HOMES = {
    "Client": "client",
    "Completion": "completion",
    "CompletionOutput": "completion",
    "ConfigError": "config",
    "Delta": "completion",
    "EngineConfig": "config",
    "EngineError": "errors",
    "FlexGenLite": "llm",
    "Logprob": "completion",
    "Request": "request",
    "SamplingParams": "sampling_params",
    "Score": "scoring",
}


def __getattr__(name: str) -> Any:
    """Import what is exported on first use: `import flexgen_lite` itself costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

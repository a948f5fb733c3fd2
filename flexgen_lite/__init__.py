"""flexgen-lite: large language models over big batches of prompts on one ordinary machine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flexgen_lite.client.client import Client
    from flexgen_lite.client.completion import Completion, CompletionOutput, Delta, Logprob
    from flexgen_lite.client.request import Request
    from flexgen_lite.client.sampling_params import SamplingParams
    from flexgen_lite.client.scoring import Score
    from flexgen_lite.config.engine import EngineConfig
    from flexgen_lite.config.problems import ConfigError
    from flexgen_lite.errors import EngineError
    from flexgen_lite.llm import FlexGenLite

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
    "Client": "client.client",
    "Completion": "client.completion",
    "CompletionOutput": "client.completion",
    "ConfigError": "config.problems",
    "Delta": "client.completion",
    "EngineConfig": "config.engine",
    "EngineError": "errors",
    "FlexGenLite": "llm",
    "Logprob": "client.completion",
    "Request": "client.request",
    "SamplingParams": "client.sampling_params",
    "Score": "client.scoring",
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

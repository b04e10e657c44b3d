"""sinklens: causal mechanistic interpretability of attention sinks, on TransformerLens.

Names load on first use, so that `import sinklens` and `sinklens --help` do not pay for torch and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sinklens.errors import EngineError, InputError, NoSinkError
    from sinklens.models import list_models, load_model

__all__ = ["EngineError", "InputError", "NoSinkError", "__version__", "list_models", "load_model"]

# Public name -> the module that defines it.
_EXPORTS = {
    "EngineError": "sinklens.errors",
    "InputError": "sinklens.errors",
    "NoSinkError": "sinklens.errors",
    "list_models": "sinklens.models",
    "load_model": "sinklens.models",
}
# Public submodules, reachable as attributes (`sl.models`).
_SUBMODULES = frozenset({"errors", "models"})


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"sinklens.{name}")
    else:
        raise AttributeError(f"module 'sinklens' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_SUBMODULES})

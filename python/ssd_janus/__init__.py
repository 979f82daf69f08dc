"""Per-head compressed KV caches for transformers' Janus: `enable` / `disable` on a model, and a picture `Pipeline`.

transformers is imported on first use, so that importing this package (and ``ssd-janus --help``) stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hooks import disable, enable
    from .pipeline import Pipeline
    from .shape import ModelShape

__all__ = ["ModelShape", "Pipeline", "disable", "enable"]

_HOMES = {"enable": "hooks", "disable": "hooks", "Pipeline": "pipeline", "ModelShape": "shape"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""Per-head compressed KV caches for decoders of transformers: `attach` and `detach`.

transformers is imported on first use, so that importing this package stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .choice import Choice
    from .coupling import attach, attached, caches, detach
    from .models import PictureForm
    from .shape import ModelShape

__all__ = ["Choice", "ModelShape", "PictureForm", "attach", "attached", "caches", "detach"]

_HOMES = {"attach": "coupling", "attached": "coupling", "caches": "coupling", "detach": "coupling", "Choice": "choice",
          "ModelShape": "shape", "PictureForm": "models"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

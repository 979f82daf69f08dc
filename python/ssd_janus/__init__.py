"""Per-head compressed KV caches: `enable` / `disable` on a Janus, `attach` / `detach` on any decoder of transformers,
and a picture `Pipeline`.

transformers is imported on first use, so that importing this package (and ``ssd-janus --help``) stays fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssd_attach import attach, attached, detach

    from .hooks import disable, enable, enabled
    from .pipeline import Pipeline
    from .shape import ModelShape

__all__ = ["ModelShape", "Pipeline", "attach", "attached", "detach", "disable", "enable", "enabled"]

_HOMES = {"enable": ".hooks", "enabled": ".hooks", "disable": ".hooks", "Pipeline": ".pipeline", "ModelShape": ".shape",
          "attach": "ssd_attach", "attached": "ssd_attach", "detach": "ssd_attach"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

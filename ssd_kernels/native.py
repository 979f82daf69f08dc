"""The compiled extension, if it was built."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

_C: ModuleType | None = None
_reason = ""
try:
    _C = importlib.import_module("ssd_kernels._C")
except ModuleNotFoundError:
    _reason = "the compiled extension was not built for this Python (see the README, Install)"
except ImportError as error:
    _reason = f"the compiled extension does not load: {error}"


def extension() -> ModuleType:
    """The extension module. Raises RuntimeError, with the reason, when it is not there."""
    if _C is None:
        raise RuntimeError(_reason)
    return _C


def missing() -> str | None:
    """Why there is no extension, or None when there is."""
    return _reason or None


def build_info() -> dict[str, Any]:
    """What the extension was built with; ``{"built": False, "reason": ...}`` without one."""
    if _C is None:
        return {"built": False, "reason": _reason}
    return {"built": True, **_C.build_info()}

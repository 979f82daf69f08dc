"""The compiled extension, if it was built."""

from __future__ import annotations

from types import ModuleType
from typing import Any

_C: ModuleType | None
try:
    from . import _C
except ImportError as error:  # a source tree that was never built, or built for another Python
    _C = None
    _reason = f"the compiled extension did not import: {error}"
else:
    _reason = ""


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

"""Checks of what callers pass: errors name the argument, what was given and what is allowed."""

from __future__ import annotations

from .reading import shown

__all__ = ["check_int"]


def check_int(name: str, value: object, minimum: int) -> int:
    """``value`` as an int that is at least ``minimum``.

    Raises:
        TypeError: ``value`` is not an integer (bool does not count as one).
        ValueError: ``value`` is below ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {shown(value)} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {shown(value)}")
    return value

"""What a value from a file must look like, put together from parts: for files with many fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .reading import Field

__all__ = ["Check", "count", "list_of", "mapping_of", "maybe", "number", "object_of", "positive"]

Check = Callable[[Field], Any]  # raises the ValueError of `Field` where the value is another


def count(field: Field) -> int:
    """An int of at least 0 that fits into 64 bits."""
    return field.integer(0, 2**63 - 1)


def number(field: Field) -> float:
    """A finite number of at least 0."""
    return field.number(0)


def positive(field: Field) -> float:
    """A finite number above 0, so that one can be divided by it."""
    if (value := field.number()) <= 0:
        field.refuse("a number above 0")
    return value


def maybe(check: Check) -> Check:
    """Null, or what ``check`` allows."""
    return lambda field: None if field.value is None else check(field)


def list_of(check: Check, least: int = 0, most: int | None = None) -> Check:
    """A list of ``least`` .. ``most`` values that ``check`` allows."""
    return lambda field: [check(item) for item in field.items(least, most)]


def mapping_of(check: Check) -> Check:
    """An object with any names, whose values ``check`` allows."""
    return lambda field: {name: check(member) for name, member in field.members(optional=None).items()}


def object_of(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None,
              others: bool = False) -> Check:
    """An object whose fields have a check each.

    Args:
        required: by name, what must be there.
        optional: by name, what may be there.
        others: whether fields of other names may be there too.
    """
    known = {**required, **(optional or {})}

    def check(field: Field) -> dict[str, Any]:
        members = field.members(tuple(required), None if others else tuple(optional or ()))
        return {name: known[name](member) if name in known else member.value for name, member in members.items()}

    return check

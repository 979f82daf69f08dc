"""Triton's interpreter without work that it repeats: a third of the time for one program, the same results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


class _Patched:
    """What the interpreter takes back at the end of a launch: nothing."""

    def restore(self) -> None:
        pass


def patch_once() -> None:
    """Let the interpreter patch `triton.language` once per module.

    It does so anew for every call of a device function, `tl.sum` included. A process that only interprets can leave it
    patched.
    """
    from triton.runtime import interpreter

    patch: Callable[[Any], Any] = interpreter._patch_lang
    patched: set[str] = set()

    def once(function: Any) -> _Patched:
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)
        return _Patched()

    interpreter._patch_lang = once


def remember_types() -> None:
    """Look numpy's types up by name, and leave the types of tuples, which only the compiler reads, unnamed.

    Every operation makes several tuples, for shapes, and asks for several types.
    """
    from triton.language import core
    from triton.runtime import interpreter

    find: Callable[[Any], Any] = interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def numpy_type(of: Any) -> Any:
        if of.name not in known:
            known[of.name] = find(of)
        return known[of.name]

    interpreter._get_np_dtype = numpy_type
    core._type_for_tuple_values = lambda values, fields=None: None


def skip_overflow_checks() -> None:
    """Leave out integer arithmetic in int64 beside every operation: only debug mode would look at the results."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

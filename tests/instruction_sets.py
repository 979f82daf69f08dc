"""The CPU kernels of one instruction set after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ssd_kernels import native


@contextmanager
def using(instruction_set: str) -> Iterator[str]:
    """Kernels on a CPU are of this instruction set inside the block, of the best one afterwards; skips without it."""
    extension = native.extension()
    best = extension.instruction_set()
    try:
        extension.set_instruction_set(instruction_set)
    except ValueError:
        pytest.skip(f"this machine lacks {instruction_set}")
    try:
        yield instruction_set
    finally:
        extension.set_instruction_set(best)

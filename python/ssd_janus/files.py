"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

from ssd_kernels.files import write_atomically

__all__ = ["write_atomically", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""
    write_atomically(path, lambda file: file.write(text.encode()))

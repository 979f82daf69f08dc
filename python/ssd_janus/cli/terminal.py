"""What the commands print, errors included."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console

console = Console(highlight=False)
messages = Console(stderr=True, highlight=False)


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Report what the user can put right in one line and exit with code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
            if os.environ.get("SSD_JANUS_TRACEBACK"):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            messages.print(f"error: {text}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(2) from None

    return run


def show_bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"

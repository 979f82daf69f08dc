"""What the commands print, and how they end: errors in one line, signals without a trace."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..ranks import Ranks

# What users write is printed as it is: brackets are no markup, colons no emoji.
console = Console(highlight=False, markup=False, emoji=False)
messages = Console(stderr=True, highlight=False, markup=False, emoji=False)

# Options that a run takes less memory with, by the parameter of a command that holds them.
SAVERS = {"batch_size": "a lower --batch-size", "budget": "a lower --budget", "dtype": "a smaller --dtype"}
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


def as_command(function: Callable[..., None]) -> Callable[..., None]:
    """A function as a command: what the user can put right is reported in one line.

    Exit codes: 2 after an error, 128 + the signal's number after SIGINT, SIGTERM or SIGHUP, which end a command where
    it is, so that files are whole or not there. With ``SSD_JANUS_TRACEBACK`` in the environment errors have tracebacks.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _ending_on_signals():
                function(*args, **kwargs)
        except KeyboardInterrupt:
            messages.print("stopped")
            raise typer.Exit(128 + signal.SIGINT) from None
        except (BrokenPipeError, typer.Exit):
            raise  # who read the output has gone, and typer ends quietly; or the command chose its exit code
        except (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError) as error:
            if os.environ.get("SSD_JANUS_TRACEBACK"):
                raise
            messages.print(f"error: {explain(error, inspect.signature(function).parameters)}", style="red",
                           soft_wrap=True)
            raise typer.Exit(2) from None

    return run


def explain(error: Exception, options: Iterable[str] = ()) -> str:
    """An error in one line; where memory has run out, with what to lower among ``options``, parameters of a command."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, (MemoryError, RuntimeError)):
        lower = text.lower()
        if isinstance(error, MemoryError) or any(sign in lower for sign in NO_MEMORY):
            savers = [SAVERS[name] for name in options if name in SAVERS]
            advice = f"; {' or '.join(savers)} takes less" if savers else ""
            return f"out of memory{advice} ({text[:160]})"
    return text


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, as SIGINT raises KeyboardInterrupt; a second one kills the process."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        messages.print("stopped")
        sys.exit(128 + number)

    caught = []
    if threading.current_thread() is threading.main_thread():
        caught = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def say(line: str) -> None:
    """A line about the run, on stderr."""
    messages.print(f"note: {line}", soft_wrap=True)


def saying(ranks: Ranks) -> Callable[[str], None]:
    """`say` for one of several processes, which says which one it is."""
    return say if ranks.alone else lambda line: say(f"{ranks}: {line}")


def table(rows: Iterable[Sequence[str]], header: Sequence[str] | None = None) -> Table:
    """A table of plain texts: brackets in them are no markup."""
    made = Table(show_header=header is not None, box=None, pad_edge=False)
    for name in header or ():
        made.add_column(Text(name))
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def print_table(made: Table, out: Console = console) -> None:
    """Print without shortening cells to the width of a terminal, which a file or a pipe does not even have."""
    made.width = out.measure(made, options=out.options.update(max_width=1000)).maximum
    out.print(made, soft_wrap=True)

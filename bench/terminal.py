"""What the commands print: tables on stdout, what is being done on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ssd_janus.cli import terminal
from ssd_janus.progress import PAUSE

from .records import Record
from .tables import describe, machine_line, points

Report = Callable[[str, float], None]  # what is being done, and the share of all work that is done


@contextmanager
def status() -> Iterator[Report]:
    """Tell what is being done during the block: a line that changes on a terminal, lines now and then in a log."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield log()
        return
    with console.status("starting") as line:
        yield lambda text, share: line.update(Text(text))


def log(clock: Callable[[], float] = time.monotonic) -> Report:
    """Prints a line on stderr at every tenth of the work, and in between at most every half minute.

    Args:
        clock: seconds.
    """
    printed, tenths = clock(), -1

    def report(text: str, share: float) -> None:
        nonlocal printed, tenths
        now = clock()
        if int(10 * share) > tenths or now - printed >= PAUSE:
            printed, tenths = now, max(tenths, int(10 * share))
            print(text, file=sys.stderr, flush=True)

    return report


def print_records(lines: Sequence[Record]) -> None:
    """Print a table per point, with the machine below."""
    for group in points(lines):
        title, columns, rows, texts = describe(group)
        print_table(title, columns, rows, texts)
        print(machine_line(group[0]), end="\n\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> None:
    """Print a table whose first ``texts`` columns are text and the others numbers."""
    table = Table(title=Text(title))
    for number, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if number < texts else "right", no_wrap=number >= texts,
                         min_width=16 if number < texts else None)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if console.is_terminal:
        console.print(table)
    else:
        terminal.print_table(table, console)

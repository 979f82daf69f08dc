"""How far a long run is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from .ranks import ALONE, Ranks

ProgressCallback = Callable[[int, int], Any]

PAUSE = 30.0  # seconds between lines of one tenth


@contextmanager
def progress_bar(description: str, ranks: Ranks = ALONE) -> Iterator[ProgressCallback]:
    """The progress of the block on stderr; the value is ``report(done, total)``, in steps.

    On a terminal it is a bar; elsewhere, and where several processes may share the terminal, lines, as `Lines` prints
    them, which say whose they are.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not (console.is_terminal and ranks.alone):
        yield Lines(description if ranks.alone else f"{ranks}, {description}").report
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, refresh_per_second=5) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class Lines:
    """Progress for a log: a line on stderr at every tenth, and in between at most every half minute."""

    def __init__(self, description: str, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            description: what every line begins with.
            clock: seconds.
        """
        self.description, self.clock = description, clock
        self.began = self.printed = clock()
        self.first: int | None = None  # what was done when the first report came
        self.tenth = 0

    def report(self, done: int, total: int) -> None:
        """Say that ``done`` steps out of ``total`` are done; prints if it is time to."""
        now = self.clock()
        tenth = 10 * done // total if total else 0
        if self.first is None:
            # One step is what the first report usually reports; work of an earlier run says nothing about speed.
            self.first = max(done - 1, 0)
            self.tenth = 10 * self.first // total if total else 0
        if tenth == self.tenth and now - self.printed < PAUSE:
            return
        self.tenth, self.printed = tenth, now
        elapsed = now - self.began
        left = elapsed * (total - done) / (done - self.first) if done > self.first else None
        rest = "" if left is None else f", {_span(left)} left"
        print(f"{self.description}: {done}/{total} steps, {_span(elapsed)} elapsed{rest}", file=sys.stderr, flush=True)


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))

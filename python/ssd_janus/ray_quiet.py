"""Keep Ray quiet where results are printed: what no option of Ray does. Everything is as before when a block ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_about_workers(ray: Any, verbose: bool) -> Iterator[None]:
    """Inside the block Ray does not print on stdout which workers died."""
    module = getattr(getattr(ray, "_private", None), "worker", None)
    printed = getattr(module, "_worker_logs_enabled", None)
    if printed is None or verbose:
        yield
        return
    module._worker_logs_enabled = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        module._worker_logs_enabled = printed  # type: ignore[union-attr]


class _Others(logging.Filter):
    """Passes what is not about the dataset of a name, nor logged by the thread that made this filter."""

    def __init__(self, dataset: str) -> None:
        super().__init__()
        self.dataset, self.thread = dataset, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.thread == self.thread or self.dataset in (record.threadName or "")
                    or self.dataset in record.getMessage())


@contextmanager
def quiet_about_dataset(name: str, verbose: bool) -> Iterator[None]:
    """Inside the block Ray Data logs nothing about a dataset on the console; it still does in its own files."""
    consoles = [] if verbose else [handler for handler in logging.getLogger("ray.data").handlers
                                   if isinstance(handler, logging.StreamHandler)]
    others = _Others(name)
    for handler in consoles:
        handler.addFilter(others)
    try:
        yield
    finally:
        for handler in consoles:
            handler.removeFilter(others)

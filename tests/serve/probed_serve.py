"""`ssd-janus serve` in a process that can be asked what it holds: on SIGUSR1 it writes that to a file."""

from __future__ import annotations

import asyncio
import collections
import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from ssd_janus.cli import app


def tell(*_: Any) -> None:
    """Objects by their types, tasks that go on, threads, open descriptors, and resident bytes."""
    gc.collect()
    objects = gc.get_objects()
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    held = {"objects": collections.Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in objects),
            "tasks": sum(isinstance(each, asyncio.Task) and not each.done() for each in objects),
            "threads": threading.active_count(), "descriptors": len(os.listdir("/proc/self/fd")),
            "bytes": pages * os.sysconf("SC_PAGE_SIZE")}
    part = Path(f"{FILE}.part")
    part.write_text(json.dumps(held), encoding="utf-8")
    part.replace(FILE)


if __name__ == "__main__":
    FILE = sys.argv.pop(1)
    signal.signal(signal.SIGUSR1, tell)
    app()

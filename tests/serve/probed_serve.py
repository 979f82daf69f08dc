"""`ssd-janus serve` in a process that can be asked what it holds: on SIGUSR1 it writes that to a file."""

from __future__ import annotations

import asyncio
import collections
import ctypes
import gc
import json
import os
import signal
import sys
import threading
import urllib.parse
from pathlib import Path
from typing import Any

from ssd_janus.cli import app


def tell(*_: Any) -> None:
    """Objects by their types, tasks that go on, threads, open descriptors, and resident bytes."""
    urllib.parse.clear_cache()  # of URLs of kept pictures, each of which is another
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    objects = gc.get_objects()
    # The collector tracks neither bytes, as pictures and bodies are, nor tuples of what it does not track.
    tuples = [each for each in gc.get_referents(*objects) if type(each) is tuple and not gc.is_tracked(each)]
    texts = {id(each): each for each in gc.get_referents(*objects, *tuples) if type(each) is bytes}
    kinds = map(type, (*objects, *texts.values()))
    held = {"objects": collections.Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in kinds),
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

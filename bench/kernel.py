"""`ssd-bench kernel`: one decode step of one layer, ours and its rivals, gated by correctness, on cold caches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssd_kernels import backends

from . import machine, ours, rivals, rivals_gpu
from .contender import Arena, Built, Contender, NotInstalled, WrongResult, copies_of, count_launches, fill
from .point import Point
from .records import OK, Record, record
from .timing import REPETITIONS, TRIALS, Timing, Work, stopwatch, time_in_turn

LARGE, LARGE_ON_GPU = 2**27, 2**30  # bytes of a read or copy in which starting it counts for nothing
READ, READ_LARGE, COPY_LARGE = "read the kept bytes once", "large read", "large copy"


@dataclass(frozen=True)
class Options:
    """What to run at a point.

    Attributes:
        device: where. backends: of ours; None for all that can run there but the slow reference.
        scored, row_buffers, kv_formats: kinds of our plans. only: parts of contenders' names; empty for all.
        repetitions, trials: of the protocol.
        launches: count kernels, for which torch's profiler looks into every contender on a GPU.
    """

    device: torch.device = torch.device("cpu")
    backends: Sequence[str] | None = None
    scored: Sequence[bool] = (False, True)
    row_buffers: Sequence[int] = (0, 24)
    kv_formats: Sequence[str] = ("auto",)
    only: Sequence[str] = ()
    repetitions: int = REPETITIONS
    trials: int = TRIALS
    launches: bool = True

    def backend_names(self) -> list[str]:
        if self.backends is not None:
            return list(self.backends)
        names = ("cpu",) if self.device.type == "cpu" else ("cuda", "triton")
        return [name for name in names if backends.available().get(name, "absent") is None]


def contenders(point: Point, options: Options) -> list[Contender]:
    """Ours first, then the rivals for the device, as far as ``options.only`` asks for them.

    Raises:
        ValueError: it asks for none of them.
    """
    arena = Arena(point, options.device)
    found = ours.contenders(point, options.backend_names(), options.scored, options.row_buffers, options.kv_formats,
                            options.device)
    found += rivals.contenders(point, arena, options.device)
    if options.device.type == "cuda":
        found += rivals_gpu.contenders(point, arena, options.device)
    names = [one.name for one in found]
    found = [one for one in found if not options.only or any(part in one.name for part in options.only)]
    if not found:
        raise ValueError(f"only must be part of one of {'; '.join(names)}, got {', '.join(options.only)}")
    available = machine.available_bytes(options.device)
    arena.reserve(max((one.needs for one in found if one.backend is None and one.needs < available), default=0))
    return found


def measure(point: Point, options: Options, progress: Callable[[str], None] = lambda text: None) -> list[Record]:
    """Benchmark every contender at one point in one run.

    A contender whose output or kept tokens are wrong, whose library is missing or that does not fit gets a record
    that says so instead of a number. The first record is a plain read of the bytes that are kept.

    Args:
        progress: called with what is being done.

    Raises:
        Exception: one of ours failed, and not for lack of memory.
    """
    torch.manual_seed(0)
    about = machine.facts(options.device)
    built: dict[str, Built] = {}
    status: dict[str, str] = {}
    listed = contenders(point, options)
    for one in listed:
        progress(f"checking {one.name}")
        ready = prepare(one, options.device)
        if isinstance(ready, str):
            status[one.name] = ready
        else:
            built[one.name] = ready
    works = {name: ready.work for name, ready in built.items()} | ceilings(point, options.device)
    watches = {}
    mine = {one.name for one in listed if one.backend is not None}
    for name, work in works.items():
        progress(f"preparing {name}")
        try:
            watches[name] = stopwatch(work, options.device), work
        except RuntimeError as error:  # torch's words for what a graph cannot hold
            if name in mine and not isinstance(error, torch.OutOfMemoryError):
                raise
            status[name] = f"failed: {first_line(error)}"
    timings = time_in_turn(watches, options.repetitions, options.trials, lambda name: progress(f"timing {name}"))
    about["load_after"] = machine.load()
    # Afterwards: a GPU that is being profiled is slower.
    launches = {name: ready.launches if ready.launches and options.device.type == "cpu"
                else count_launches(ready.work.calls[-1], options.device) if options.launches else None
                for name, ready in built.items()}
    kept, large = point.attend_bytes(), large_bytes(options.device)
    rates = {"read": max(large / timings[READ_LARGE].median, kept / timings[READ].median),
             "copy": 2 * large / timings[COPY_LARGE].median}
    lines = [_record(about, point, {"name": READ, "does": "read (torch.sum)", "omits": "everything else"}, OK,
                     timings[READ], rates, {"useful": kept, "read": kept, "allocated": kept}, 1)]
    for one in listed:
        if one.name in status:
            lines.append(_record(about, point, one.to_dict(), status[one.name], None, rates, None, None))
            continue
        ready = built[one.name]
        size = {"useful": ready.useful, "read": ready.read, "allocated": ready.allocated}
        lines.append(_record(about, point, one.to_dict(), OK, timings[one.name], rates, size, launches[one.name],
                             setup_seconds=ready.setup_seconds))
    del built, works, watches
    gc.collect()
    return lines


def prepare(one: Contender, device: torch.device) -> Built | str:
    """A contender made ready and found correct, or why it gets no number."""
    if one.needs > machine.available_bytes(device):
        return f"does not fit: needs {one.needs / 1e9:.1f} GB"
    try:
        ready = one.build()
        ready.check()
    except NotInstalled as error:
        return f"not installed: {error}"
    except WrongResult as error:
        return f"wrong: {error}"
    except Exception as error:  # a rival of another library may raise anything, and the table shall still come out
        if one.backend is not None and not isinstance(error, torch.OutOfMemoryError):
            raise
        return f"failed: {first_line(error)}"
    return ready


def ceilings(point: Point, device: torch.device) -> dict[str, Work]:
    """Plain reads and a copy of memory: what the hardware gives."""
    def reads(nbytes: int) -> Work:
        data = [torch.empty(max(nbytes // 4, 1), device=device) for _ in range(copies_of(nbytes))]
        for one in data:
            fill(one)
        return Work([one.sum for one in data])

    large = large_bytes(device)
    source, target = (torch.empty(large // 4, device=device) for _ in range(2))
    fill(source)
    return {READ: reads(point.attend_bytes()), READ_LARGE: reads(large),
            COPY_LARGE: Work([lambda: target.copy_(source)])}


def large_bytes(device: torch.device) -> int:
    """Bytes of the large read and of the large copy."""
    return LARGE_ON_GPU if device.type == "cuda" else LARGE


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def share(line: Record) -> float:
    """Useful bytes per second over the highest rate that the same run measured."""
    rate: float = line["bytes"]["useful"] / line["seconds"]["median"]
    return rate / float(max(line["ceiling"].values()))


def ours_of(lines: Sequence[Record]) -> Record | None:
    """The record that times are compared with: our first with scores, in full precision and without a row buffer, else
    our first.
    """
    mine = [line for line in lines if line["contender"].get("backend") and line["status"] == OK]
    plain = [line for line in mine if line["contender"]["scored"] and not line["contender"]["row_buffer"]
             and line["contender"].get("kv_format", "auto") == "auto"]
    return next(iter(plain or mine), None)


def any_wrong(lines: Sequence[Record]) -> bool:
    """Whether one of ours failed the gate."""
    return any(line["contender"].get("backend") and line["status"].startswith("wrong") for line in lines)


def _record(about: dict[str, Any], point: Point, contender: dict[str, Any], status: str, timing: Timing | None,
            rates: dict[str, float], size: dict[str, int] | None, launches: int | None, **more: Any) -> Record:
    return record("kernel", about, point.to_dict() | {"device": about["device"]}, contender, status=status,
                  seconds=timing and asdict(timing), ceiling=rates, bytes=size, launches=launches, **more)

"""`ssd-bench kernel`: one decode step of one layer, ours and its rivals, gated by correctness, on cold caches."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssd_kernels import backends

from . import ceiling, machine, ours, rivals, rivals_gpu
from .ceiling import LOOP, READ
from .contender import Arena, Built, Contender, NotInstalled, WrongResult, count_launches
from .point import Point
from .records import OK, Record, record
from .timing import PATIENCE, REPETITIONS, TRIALS, Protocol, Timing, stopwatch, time_in_turn


@dataclass(frozen=True)
class Options:
    """What to run at a point.

    Attributes:
        device: where. backends: of ours; None for all that can run there but the slow reference.
        scored, row_buffers, kv_formats: kinds of our plans. only: parts of contenders' names; empty for all.
        repetitions, trials, patience: of the protocol.
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
    patience: float = PATIENCE
    launches: bool = True

    @property
    def protocol(self) -> Protocol:
        # What a GPU is given at once hides how long giving it takes.
        burst = self.repetitions if self.device.type == "cuda" else 1
        return Protocol(self.repetitions, self.trials, self.patience, burst)

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
    that says so instead of a number. The first records are plain reads of the bytes that are kept.

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
    kept = point.attend_bytes()
    # Ceilings and ours side by side, so that they come within milliseconds of each other.
    works = ceiling.works(kept, options.device) | {name: ready.work for name, ready in built.items()}
    watches = {}
    mine = {one.name for one in listed if one.backend is not None}
    for number, (name, work) in enumerate(works.items()):
        progress(f"preparing {name}")
        try:
            watches[name] = stopwatch(work, options.device, number), work
        except RuntimeError as error:  # torch's words for what a graph cannot hold
            if name in mine and not isinstance(error, torch.OutOfMemoryError):
                raise
            status[name] = f"failed: {first_line(error)}"
    timings, moved = time_in_turn(watches, options.protocol, ceiling.names(watches),
                                  lambda text: progress(f"timing, {text}"))
    about["load_after"] = machine.load()
    # Afterwards: a GPU that is being profiled is slower.
    launches = {name: ready.launches if ready.launches and options.device.type == "cpu"
                else count_launches(ready.work.calls[-1], options.device) if options.launches else None
                for name, ready in built.items()}
    rates = ceiling.rates(timings, kept, options.device)
    size = {"useful": kept, "read": kept, "allocated": kept}
    lines = []

    def add(contender: dict[str, Any], why: str, timing: Timing | None = None, size: dict[str, int] | None = None,
            launches: int | None = None, **more: Any) -> None:
        lines.append(record("kernel", about, point.to_dict() | {"device": about["device"]}, contender, status=why,
                            seconds=timing and asdict(timing), ceiling=rates, moved=moved, bytes=size,
                            launches=launches, **more))

    if "loop" in rates:
        best = min(ceiling.names(timings), key=lambda name: timings[name].best)
        add({"name": LOOP, "does": f"read{best.removeprefix(LOOP)}", "omits": "everything else"}, OK, timings[best],
            size, 1)
    add({"name": READ, "does": "read (torch.sum)", "omits": "everything else"}, OK, timings[READ], size, 1)
    for one in listed:
        if one.name in status:
            add(one.to_dict(), status[one.name])
            continue
        ready = built[one.name]
        add(one.to_dict(), OK, timings[one.name],
            {"useful": ready.useful, "read": ready.read, "allocated": ready.allocated}, launches[one.name],
            setup_seconds=ready.setup_seconds)
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


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def share(line: Record) -> float:
    """Useful bytes per second over the highest rate at which the same run read memory, or on a GPU copied it; best with
    best.
    """
    rates = line["ceiling"]
    highest = max(rates["loop"], rates["read"]) if "loop" in rates else max(rates.values())
    return float(line["bytes"]["useful"] / line["seconds"]["best"] / highest)


def ours_of(lines: Sequence[Record], kv_format: str = "auto") -> Record | None:
    """The record that times are compared with: our first with scores and without a row buffer that stores keys and
    values so; where there is none and full precision is asked for, our first.
    """
    mine = [line for line in lines if line["contender"].get("backend") and line["status"] == OK]
    plain = [line for line in mine if line["contender"]["scored"] and not line["contender"]["row_buffer"]
             and line["contender"].get("kv_format", "auto") == kv_format]
    return next(iter(plain or (mine if kv_format == "auto" else ())), None)


def any_wrong(lines: Sequence[Record]) -> bool:
    """Whether one of ours failed the gate."""
    return any(line["contender"].get("backend") and line["status"].startswith("wrong") for line in lines)


"""`ssd-bench suite`: the CPU set of `make bench`, in three files of one folder per machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import machine
from .kernel import Options, measure
from .point import Point
from .records import Record, write

DTYPES = ("float32", "bfloat16")
MAIN = Point.of_lengths()  # of the table in the README
# Enough to see how times grow: ours with scores, and the rivals that the goals name.
SWEPT = ("cpu: heavy", "mean length", "SDPA padded", "SDPA full")
BATCHES, MEANS = (1, 4, 64), (30, 80, 200)
PICTURES = (1, 8, 32)
Report = Callable[[str], None]
Job = Callable[[Report], list[Record]]


def kernel_jobs() -> Iterator[Job]:
    """Every contender at the main point."""
    for dtype in DTYPES:
        yield lambda report, dtype=dtype: measure(Point.of_lengths(dtype=dtype), Options(), report)  # type: ignore[misc]


def sweep_jobs() -> Iterator[Job]:
    """Some contenders over batches and over lengths; the main point once more, since machines drift."""
    points = [Point.of_lengths(batch=batch, dtype=dtype) for dtype in DTYPES for batch in (*BATCHES, MAIN.batch)]
    points += [Point.of_lengths(mean=mean, dtype=dtype) for dtype in DTYPES for mean in MEANS]
    for point in points:
        yield lambda report, point=point: measure(  # type: ignore[misc]
            point, Options(only=SWEPT, row_buffers=(0,), trials=2), report)


def decoder_jobs() -> Iterator[Job]:
    """Steps of the included model at several batches, and whole pictures at one."""
    def step(report: Report) -> list[Record]:
        from .decoder import Setting, loops
        from .decoder import measure as measure_loops
        from .models import INCLUDED, load

        model, prompt = load(INCLUDED, torch.float32, torch.device("cpu"))
        settings = [Setting(INCLUDED, "float32", count, 24, 480) for count in PICTURES]
        settings.append(Setting(INCLUDED, "float32", 8, 576, None, trials=1))
        return [line for setting in settings
                for line in measure_loops(model, list(loops(model, prompt)), setting, report)]

    yield step


# Steps first: the kernel's jobs leave gigabytes in the process, which would count as a step's peak of memory.
FILES: dict[str, Callable[[], Iterator[Job]]] = {
    "decoder.jsonl": decoder_jobs, "kernel.jsonl": kernel_jobs, "kernel-sweep.jsonl": sweep_jobs}


def run(results: Path, minutes: float, report: Report, done: Callable[[list[Record]], None],
        clock: Callable[[], float] = time.monotonic) -> tuple[Path, list[str]]:
    """Run the set; a file is written after every job.

    Args:
        results: folder of the machines' folders.
        minutes: no job is begun after this long.
        report: told what is being done. done: given every job's records.

    Returns:
        the machine's folder, and what was left out for lack of time.
    """
    folder, began, left = results / machine.folder_name(machine.facts(torch.device("cpu"))), clock(), []
    for name, jobs in FILES.items():
        lines: list[Record] = []
        for number, job in enumerate(jobs(), 1):
            if clock() - began > 60 * minutes:
                left.append(f"{name}, part {number}")
                continue
            found = job(lambda text, name=name: report(f"{name}: {text}"))  # type: ignore[misc]
            done(found)
            lines += found
            write(lines, folder / name)
    return folder, left

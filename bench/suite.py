"""`ssd-bench suite`: the CPU set of `make bench`, in a few files of one folder per machine."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssd_kernels.kv_format import KV_FORMATS

from . import machine
from .kernel import Options, measure
from .point import Point
from .records import Record, left_out, write
from .tables import describe

if TYPE_CHECKING:
    from .decoder import Setting
    from .terminal import Report

DTYPES = ("float32", "bfloat16")
MAIN = Point.of_lengths()  # of the table in the README
# Enough to see how times grow: ours with scores, and the rivals that the goals name.
SWEPT = ("cpu: heavy", "mean length", "SDPA padded", "SDPA full")
BATCHES, MEANS = (1, 4, 64), (30, 80, 200)
PICTURES = (1, 8, 32)
STEP_PATIENCE = 8  # times a layer's: a trial of whole steps takes seconds
# What the goals are for (`goals`): ours with scores, evicting at every step, and the rivals beside it.
AIMED = ("float32", "bfloat16", "float16"), (2, 16, 64), ("skewed", "uniform")
JUDGED = ("cpu: heavy", "mean length", "SDPA padded")


@dataclass(frozen=True)
class Job:
    """One point of the set.

    Attributes:
        kind, point: as in its records.
        run: measures it, with the seconds in which trials are repeated; told whom to tell what is being done.
    """

    kind: str
    point: dict[str, Any]
    run: Callable[[float, Callable[[str], None]], list[Record]]


def kernel_jobs() -> Iterator[Job]:
    """Every contender at the main point."""
    for dtype in DTYPES:
        yield _kernel_job(Point.of_lengths(dtype=dtype), Options(kv_formats=KV_FORMATS))


def goal_jobs() -> Iterator[Job]:
    """Points that the project has goals for; 8 bits beside bfloat16."""
    for dtype, batch, spread in itertools.product(*AIMED):
        kv_formats = KV_FORMATS if dtype == "bfloat16" else ("auto",)
        yield _kernel_job(Point.of_lengths(batch=batch, dtype=dtype, spread=spread),
                          Options(only=JUDGED, row_buffers=(0,), kv_formats=kv_formats, repetitions=30))


def sweep_jobs() -> Iterator[Job]:
    """Some contenders over batches and over lengths; the main point once more, since machines drift."""
    points = [Point.of_lengths(batch=batch, dtype=dtype) for dtype in DTYPES for batch in (*BATCHES, MAIN.batch)]
    points += [Point.of_lengths(mean=mean, dtype=dtype) for dtype in DTYPES for mean in MEANS]
    for point in points:
        yield _kernel_job(point, Options(only=SWEPT, row_buffers=(0,), trials=2))


def decoder_jobs() -> Iterator[Job]:
    """Steps of the included model at several batches, whole pictures at one, and steps in Janus-Pro-1B's shape."""
    from .decoder import Setting
    from .models import INCLUDED

    settings = [Setting(INCLUDED, "float32", count, 24, 480) for count in PICTURES]
    settings += [Setting("1b", "bfloat16", count, 4, 480) for count in (1, 8)]
    settings.append(Setting(INCLUDED, "float32", 8, 576, None, trials=1))
    for setting in settings:
        yield Job(setting.kind, setting.point(), functools.partial(_decoder, setting))


def _kernel_job(point: Point, options: Options) -> Job:
    where = {"device": options.device.type}

    def run(patience: float, report: Callable[[str], None]) -> list[Record]:
        return measure(point, replace(options, patience=patience), report)

    return Job("kernel", point.to_dict() | where, run)


def _decoder(setting: Setting, patience: float, report: Callable[[str], None]) -> list[Record]:
    from . import decoder, models

    model, prompt = models.load(setting.model, getattr(torch, setting.dtype), torch.device("cpu"))
    kinds = {} if setting.model == models.INCLUDED else {"budgets": (0.2,), "row_buffers": (24,)}
    return decoder.measure(model, list(decoder.loops(model, prompt, **kinds)),
                           replace(setting, patience=STEP_PATIENCE * patience), report)


# Steps first: the kernel's jobs leave gigabytes in the process, which would count as a step's peak of memory.
FILES: dict[str, Callable[[], Iterator[Job]]] = {
    "decoder.jsonl": decoder_jobs, "kernel.jsonl": kernel_jobs, "kernel-goals.jsonl": goal_jobs,
    "kernel-sweep.jsonl": sweep_jobs}


def run(results: Path, minutes: float, patience: float, report: Report, done: Callable[[list[Record]], None],
        clock: Callable[[], float] = time.monotonic) -> tuple[Path, list[str]]:
    """Run the set; a file is written after every job. What there is no time for gets a record that says so.

    Args:
        results: folder of the machines' folders.
        minutes: no job is begun after this long. patience: seconds in which a job repeats trials.
        report: told what is being done, and the share of the jobs that are done. done: given every job's records.

    Returns:
        the machine's folder, and what was left out for lack of time.
    """
    about = machine.facts(torch.device("cpu"))
    folder, began, left = results / machine.folder_name(about), clock(), []
    listed = {name: list(jobs()) for name, jobs in FILES.items()}
    number, total = 0, sum(map(len, listed.values()))
    for name, jobs in listed.items():
        lines: list[Record] = []
        for job in jobs:
            share = number / total
            number += 1
            if clock() - began > 60 * minutes:
                missing = left_out(job.kind, about, job.point, f"its turn came after {minutes:g} minutes")
                lines.append(missing)
                left.append(f"{name}: {describe([missing])[0]}")
            else:
                found = job.run(patience, lambda text: report(f"{name}, {number} of {total}: {text}", share))  # noqa: B023
                done(found)
                lines += found
            write(lines, folder / name)
    return folder, left

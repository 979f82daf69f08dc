"""The GPU set of `ssd-bench kernel`, for ``make gpu``: ``python -m bench.gpu --out DIR``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from ssd_kernels import CachePlan, HeadSpec

from .kernel import Options, any_wrong, measure, share
from .point import Point
from .records import OK, Record, write
from .terminal import print_records, print_table

HEADS, HEAD_DIM, DTYPE = 16, 128, "bfloat16"  # Janus-Pro-1B
TOKENS, PROMPT, START = 576, 24, 480
BATCHES = (2, 16, 64, 256)
# FlexAttention compiles anew for every shape: it is timed at one batch.
QUICK = ("ssd_kernels", "SDPA", "bmm", "FlashAttention", "flash-attn", "FlashInfer", "xformers", "fla")


def plans() -> Iterator[tuple[str, CachePlan]]:
    """A layer of SSD's two kinds of heads at a fifth of the tokens, and one that keeps everything."""
    half = [HeadSpec.window(91) if head % 2 else HeadSpec.heavy(91, recent=45, score="mean") for head in range(HEADS)]
    yield "20%, two kinds of heads, row buffer 24", CachePlan([half], row_buffer=24)
    yield "everything kept", CachePlan([[HeadSpec.full()] * HEADS])


def jobs(device: torch.device) -> Iterator[tuple[Point, Options]]:
    """What to measure, the most telling first: time may run out."""
    for batch in (16, 2, 64, 256):
        yield Point.of_lengths(batch, HEADS, HEAD_DIM, DTYPE), Options(device, only=() if batch == 16 else QUICK)
    for name, plan in plans():
        for batch in BATCHES:
            point = Point.of_plan(plan, 0, name, batch, HEAD_DIM, DTYPE, PROMPT, START, TOKENS)
            yield point, Options(device, only=("ssd_kernels", "SDPA full", "varlen"))


def summary(lines: Sequence[Record]) -> list[list[str]]:
    """Our lines of all points: point, batch, contender, median microseconds, share of the measured ceiling."""
    return [[line["point"]["label"], str(line["point"]["batch"]), line["contender"]["name"],
             f"{1e6 * line['seconds']['median']:.1f}", f"{share(line):.0%}"]
            for line in lines if line["contender"].get("backend") and line["status"] == OK]


def main(out: Annotated[Path, typer.Option(help="Folder for kernel.jsonl.")],
         minutes: Annotated[float, typer.Option(help="Start no further point after this long.")] = 4) -> None:
    """Time every GPU backend present against what else is installed, and print the tables, ours once more last."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA device")
    lines: list[Record] = []
    began = time.monotonic()
    for point, options in jobs(torch.device("cuda")):
        if time.monotonic() - began > 60 * minutes:
            typer.echo(f"left out for lack of time: batch {point.batch}, {point.label}")
            continue
        found = measure(point, options)
        print_records(found)
        lines += found
        write(lines, out / "kernel.jsonl")
        torch.cuda.empty_cache()
    print_table("ours", ("point", "batch", "contender", "us", "of ceiling"), summary(lines), 3)
    raise typer.Exit(any_wrong(lines))


if __name__ == "__main__":
    typer.run(main)

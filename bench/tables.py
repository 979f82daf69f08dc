"""Results as tables: the same columns on the terminal, in Markdown and on the report's page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from .goals import floor_share, moved
from .kernel import ours_of, share
from .records import OK, Record

DECODER_COLUMNS = ("", "ms/step", "median", "+-", "linear", "attention", "rest", "tok/s", "pict./s", "first..last row",
                   "cache MB", "peak MB", "of floor", "x transf.", "x full")
OF_PICTURES = ("pict./s", "first..last row")
SERVE_COLUMNS = ("", "served/s", "at once", "wait", "p99", "first row", "p99", "picture", "p99")
SERVE_NOTES = {
    "served/s": "pictures over the time from the first one's arrival until the last one was there",
    "at once": "pictures that were drawn at once, on average over the steps",
    "wait": "seconds from a picture's arrival until its drawing began, median; p99: 99 of 100 waited less",
    "first row, picture": "seconds from its arrival until its first row and all of it were there",
}
DECODER_NOTES = {
    "ms/step": "milliseconds per decoder step, the fastest; of whole pictures the median of the trials' medians",
    "linear, attention, rest": "milliseconds of a step's parts, from a further run with the clock between them; "
                               "appending to the cache belongs to attention; not shown where they do not add up to "
                               "ms/step within 10%",
    "of floor": "the time that reading weights and kept tokens once takes over ms/step",
    "pict./s": "pictures per second, of the loop of tokens only, without decoding pixels, which is the same for all",
    "first..last row": "ms/step in the picture's first and last row",
    "peak MB": "most memory of the process while it ran (on a GPU: allocated there)",
    "x transf.": "best of transformers' in this table over this; above 1 is faster than transformers",
    "x full": "our engine with everything kept over this",
}
KERNEL_COLUMNS = ("", "does", "us", "median", "+-", "GB/s", "of ceiling", "MB held", "launches", "time / ours")
COLUMN_NOTES = {
    "does": "what of the step it does; the rivals leave out appending, scores and eviction",
    "us": "microseconds per layer and step: the fastest repetition, which other work on the machine disturbed least",
    "median": "the median of the trials' medians, in microseconds",
    "+-": "slowest trial's median less the fastest's, relative; empty after a single trial",
    "GB/s": "bytes that have to move for what it does, on kept tokens only, per second; padding does not count",
    "of ceiling": "GB/s over the highest rate at which the same run could read memory (on a GPU: read or copy it)",
    "MB held": "memory for one layer, with what a call takes for itself",
    "launches": "GPU kernels, on a CPU calls of torch functions or of the extension, per layer and step",
    "time / ours": "us over ours with scores and eviction at every step; above 1 is slower than ours",
}


def points(lines: Iterable[Record]) -> list[list[Record]]:
    """Records grouped by point and machine, in their order."""
    return [list(group) for _, group in groupby(lines, lambda line: (line["kind"], line["point"], line["machine"]))]


def kernel_title(line: Record) -> str:
    point = line["point"]
    return (f"batch {point['batch']}, {point['heads']} heads x {point['head_dim']}, {point['label']}, "
            f"{point['dtype']}, cold caches")


def kernel_rows(lines: Sequence[Record]) -> list[list[str]]:
    """One row per contender under `KERNEL_COLUMNS`; a contender without a number says why under "does"."""
    reference = ours_of(lines)
    rows = []
    for line in lines:
        contender, seconds = line["contender"], line["seconds"]
        if line["status"] != OK:
            rows.append([contender["name"], line["status"], *[""] * (len(KERNEL_COLUMNS) - 2)])
            continue
        size, best = line["bytes"], seconds["best"]
        rows.append([
            contender["name"], contender["does"], f"{1e6 * best:.0f}" if best > 1e-4 else f"{1e6 * best:.1f}",
            f"{1e6 * seconds['median']:.0f}", _spread(line), f"{size['useful'] / best / 1e9:.1f}",
            f"{share(line):.0%}", f"{size['allocated'] / 1e6:.1f}", str(line["launches"] or ""),
            f"{best / reference['seconds']['best']:.2f}" if reference else ""])
    return rows


def machine_line(line: Record) -> str:
    """Who measured, in one line."""
    about, rates = line["machine"], line.get("ceiling")
    forced = " (forced: the processor has a better one)" if about.get("forced") else ""
    parts = [about.get("gpu") or f"{about['processor']}, {about['instruction_set']}{forced}",
             f"{about['threads']} threads",
             f"load {about['load']:.1f}" + (f" .. {about['load_after']:.1f}" if "load_after" in about else ""),
             f"torch {about['torch']}", f"commit {about['commit']}"]
    if rates:
        parts.append("ceiling: " + ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items()))
    if "moved" in line:
        parts.append(f"the ceiling moved by {line['moved']:.0%} between trials"
                     + (": TOO MUCH FOR A VERDICT" if moved(line) else ""))
    return "; ".join(parts)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 2) -> str:
    """A Markdown table; columns after the first ``text_columns`` are aligned right."""
    marks = ["---"] * text_columns + ["---:"] * (len(columns) - text_columns)
    return "\n".join("| " + " | ".join(map(markdown_cell, row)) + " |" for row in (columns, marks, *rows)) + "\n"


def markdown_cell(text: str) -> str:
    """A text that stays in its cell and is no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _spread(line: Record) -> str:
    """Of the trials' medians, relative; nothing for a single trial, which has none."""
    seconds = line["seconds"]
    return f"{seconds['spread'] / seconds['median']:.0%}" if len(seconds["trials"]) > 1 else ""


def decoder_title(line: Record) -> str:
    point = line["point"]
    what = "whole pictures" if point["start"] is None else f"a step at {point['start']} visual tokens"
    count = f"{point['batch']} picture{'s' if point['batch'] > 1 else ''}"
    return (f"{what}, model {point['label']}, {count} ({point['rows']} rows), {point['dtype']}, "
            f"batch: {point['batch_is']}" + (f", top-k {point['top_k']}" if "top_k" in point else ""))


def decoder_rows(lines: Sequence[Record]) -> list[list[str]]:
    """One row per loop under `DECODER_COLUMNS`."""
    timed = [line for line in lines if line["status"] == OK]
    theirs = [step_seconds(line) for line in timed if line["contender"]["backend"] is None]
    full = [step_seconds(line) for line in timed if line["contender"].get("budget") == 1.0]
    rows = []
    for line in lines:
        if line["status"] != OK:
            rows.append([f"{line['contender']['name']}: {line['status']}", *[""] * (len(DECODER_COLUMNS) - 1)])
            continue
        taken, point, size = step_seconds(line), line["point"], line["bytes"]
        split, by_row, floor = line.get("split"), line.get("by_row"), floor_share(line)
        rows.append([
            line["contender"]["name"], f"{1e3 * taken:.1f}", f"{1e3 * line['seconds']['median']:.1f}", _spread(line),
            *(f"{1e3 * split[part]:.1f}" if split else "" for part in ("linear", "attention", "rest")),
            f"{point['batch'] / taken:.1f}",
            f"{point['batch'] / line['loop_seconds']:.2f}" if "loop_seconds" in line else "",
            f"{1e3 * by_row[0]:.1f} .. {1e3 * by_row[-1]:.1f}" if by_row else "",
            f"{size['cache'] / 1e6:.1f}", f"{size['peak'] / 1e6:.0f}" if size["peak"] else "",
            "" if floor is None else f"{floor:.0%}",
            *(f"{min(others) / taken:.2f}" if others else "" for others in (theirs, full))])
    return rows


def step_seconds(line: Record) -> float:
    """The fastest step; of whole pictures, in which steps grow with the tokens in the cache, the median."""
    return float(line["seconds"]["median" if line["kind"] == "image" else "best"])


def serve_title(line: Record) -> str:
    point = line["point"]
    return (f"{point['pictures']} pictures arrive, {point['rate']:.2f} a second (Poisson, seed {point['seed']}), model "
            f"{point['label']}, {point['steps']} tokens each, up to {point['batch']} at once, {point['dtype']}, "
            f"{point['clock']} seconds")


def serve_rows(lines: Sequence[Record]) -> list[list[str]]:
    """One row per way to serve under `SERVE_COLUMNS`."""
    rows = []
    for line in lines:
        if line["status"] != OK:
            rows.append([f"{line['contender']['name']}: {line['status']}", *[""] * (len(SERVE_COLUMNS) - 1)])
            continue
        waits = [line["to"][name][share] for name in ("start", "first_row", "picture") for share in ("p50", "p99")]
        rows.append([line["contender"]["name"], f"{line['rate']:.2f}", f"{line['drawn_at_once']:.1f}",
                     *(f"{wait:.1f}" for wait in waits)])
    return rows


def describe(lines: Sequence[Record]) -> tuple[str, Sequence[str], list[list[str]], int]:
    """Title, columns, rows and number of text columns of the records of one point."""
    if lines[0]["kind"] == "kernel":
        return kernel_title(lines[0]), KERNEL_COLUMNS, kernel_rows(lines), 2
    if lines[0]["kind"] == "serve":
        return serve_title(lines[0]), SERVE_COLUMNS, serve_rows(lines), 1
    hidden = () if lines[0]["kind"] == "image" else OF_PICTURES
    shown = [number for number, name in enumerate(DECODER_COLUMNS) if name not in hidden]
    rows = [[row[number] for number in shown] for row in decoder_rows(lines)]
    return decoder_title(lines[0]), [DECODER_COLUMNS[number] for number in shown], rows, 1

"""Results as tables: the same columns on the terminal, in Markdown and on the report's page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from .kernel import OK, ours_of, share
from .records import Record

KERNEL_COLUMNS = ("", "does", "us", "+-", "best", "GB/s", "of ceiling", "MB held", "launches", "time / ours")


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
        size, median = line["bytes"], seconds["median"]
        rows.append([
            contender["name"], contender["does"], f"{1e6 * median:.0f}" if median > 1e-4 else f"{1e6 * median:.1f}",
            f"{seconds['spread'] / median:.0%}", f"{1e6 * seconds['best']:.0f}", f"{size['useful'] / median / 1e9:.1f}",
            f"{share(line):.0%}", f"{size['allocated'] / 1e6:.1f}", str(line["launches"]),
            f"{median / reference['seconds']['median']:.2f}" if reference else ""])
    return rows


def machine_line(line: Record) -> str:
    """Who measured, in one line."""
    about, rates = line["machine"], line.get("ceiling")
    parts = [about.get("gpu") or f"{about['processor']}, {about['instruction_set']}", f"{about['threads']} threads",
             f"load {about['load']:.1f}" + (f" .. {about['load_after']:.1f}" if "load_after" in about else ""),
             f"torch {about['torch']}", f"commit {about['commit']}"]
    if rates:
        parts.append("ceiling: " + ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in rates.items()))
    return "; ".join(parts)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 2) -> str:
    """A Markdown table; columns after the first ``text_columns`` are aligned right."""
    marks = ["---"] * text_columns + ["---:"] * (len(columns) - text_columns)
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, marks, *rows)) + "\n"


def describe(lines: Sequence[Record]) -> tuple[str, Sequence[str], list[list[str]], int]:
    """Title, columns, rows and number of text columns of the records of one point."""
    return kernel_title(lines[0]), KERNEL_COLUMNS, kernel_rows(lines), 2

"""Result files: JSON lines, one contender at one point each, every line with all it takes to judge it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ssd_kernels.files import write_atomically

FORMAT, VERSION = "ssd_bench", 1
LEFT_OUT = "left out"  # begins the status of a point that nobody was measured at
Record = dict[str, Any]


def record(kind: str, machine: dict[str, Any], point: dict[str, Any], contender: dict[str, Any],
           **result: Any) -> Record:
    """A line of a result file.

    Args:
        kind: "kernel", "step" or "image". machine: `machine.facts`. point: what was benchmarked.
        contender: at least its ``name``. result: ``status`` ("ok", or why there is no number), ``seconds``
            (`timing.Timing` as a dict) and whatever the kind adds.
    """
    return {"format": FORMAT, "version": VERSION, "kind": kind, "machine": machine, "point": point,
            "contender": contender, **result}


def write(records: Iterable[Record], path: Path) -> None:
    """Write records as JSON lines; the file appears whole or not at all, its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in records)
    write_atomically(path, lambda file: file.write(text.encode()))


def read(*paths: Path) -> list[Record]:
    """All records of files, and of the ``.jsonl`` files directly in folders, in order of name.

    Raises:
        FileNotFoundError: no such file, or a folder without results.
        ValueError: a line that no version of ssd-bench of this format wrote; the message names file and line.
    """
    found = []
    for path in paths:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path} holds no .jsonl file")
        for file in files:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    data = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}, line {number}: not JSON: {error}") from error
                if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
                    raise ValueError(f"{file}, line {number}: must be {FORMAT!r} of version {VERSION}")
                found.append(data)
    return found


def key(line: Record) -> tuple[str, str, str]:
    """What makes two records the same measurement: kind, point and contender, as text."""
    return line["kind"], json.dumps(line["point"], sort_keys=True), line["contender"]["name"]


def left_out(kind: str, machine: dict[str, Any], point: dict[str, Any], why: str) -> Record:
    """The record that stands for all contenders at a point that was not measured."""
    return record(kind, machine, point, {"name": "all contenders", "does": "", "omits": "", "backend": None},
                  status=f"{LEFT_OUT}: {why}", seconds=None)


def measured(lines: Iterable[Record]) -> list[Record]:
    """Those with a number."""
    return [line for line in lines if line["status"] == "ok"]

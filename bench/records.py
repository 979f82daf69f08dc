"""Result files: JSON lines, one contender at one point each, every line with all it takes to judge it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ssd_kernels.files import write_atomically
from ssd_kernels.reading import Field, naming, read_json_lines
from ssd_kernels.schema import count, list_of, maybe, number, object_of, positive

FORMAT, VERSION = "ssd_bench", 1
LARGEST = 2**26  # bytes of a file
OK = "ok"  # the status of a record with a number
LEFT_OUT = "left out"  # begins the status of a point that nobody was measured at
# What makes numbers comparable, of a record's machine.
SAME_MACHINE = ("processor", "cores", "threads", "instruction_set", "gpu", "driver", "torch")
SAME_RUN = (*SAME_MACHINE, "ssd_kernels", "commit")
Record = dict[str, Any]

TEXT = Field.string
MACHINE = object_of(
    {"processor": TEXT, "cores": maybe(count), "threads": count, "memory_bytes": count, "instruction_set": maybe(TEXT),
     "load": number, "python": TEXT, "torch": TEXT, "ssd_kernels": TEXT, "commit": maybe(TEXT), "command": TEXT},
    {"load_after": number, **dict.fromkeys(("gpu", "driver", "cuda", "triton"), maybe(TEXT))}, others=True)
SIZES = {"label": TEXT, "batch": positive, "dtype": TEXT}
KERNEL_POINT = object_of({**SIZES, "heads": positive, "head_dim": positive, "mean": positive, "full": positive,
                          "lengths": list_of(positive, 1)}, others=True)
DECODER_POINT = object_of({**SIZES, "rows": positive, "steps": positive, "start": maybe(count), "batch_is": TEXT},
                          others=True)
SERVE_POINT = object_of({**SIZES, "pictures": positive, "steps": positive, "rate": positive, "seed": count,
                         "clock": TEXT}, others=True)
POINTS = {"kernel": KERNEL_POINT, "step": DECODER_POINT, "image": DECODER_POINT, "serve": SERVE_POINT}
OURS = object_of({"backend": TEXT, "row_buffer": count}, others=True)
CONTENDERS = {"kernel": object_of({"name": TEXT}, {"does": TEXT, "scored": Field.boolean}, others=True),
              "step": object_of({"name": TEXT, "backend": maybe(TEXT)}, {"budget": number}, others=True)}
CONTENDERS["image"] = CONTENDERS["serve"] = CONTENDERS["step"]
SECONDS = object_of({"median": positive, "best": positive, "spread": number, "trials": list_of(positive, 1)},
                    {"bests": list_of(positive, 1)})
CEILING = object_of({"read": positive, "copy": positive}, {"loop": positive})
KERNEL_FIGURES = object_of({"seconds": SECONDS, "ceiling": CEILING,
                            "bytes": object_of(dict.fromkeys(("useful", "read", "allocated"), positive)),
                            "launches": maybe(count)}, {"moved": number}, others=True)
DECODER_FIGURES = object_of(
    {"seconds": SECONDS, "bytes": object_of({"cache": count, "peak": maybe(count)})},
    {"split": object_of(dict.fromkeys(("linear", "attention", "rest"), number)), "by_row": list_of(positive, 1),
     "loop_seconds": positive, "moved": number, "floor": object_of(dict.fromkeys(("bytes", "read"), positive))},
    others=True)
WAITS = object_of(dict.fromkeys(("mean", "p50", "p99"), number))
SERVE_FIGURES = object_of({"seconds": SECONDS, "rate": positive, "drawn_at_once": number,
                           "to": object_of(dict.fromkeys(("start", "first_row", "picture"), WAITS))}, others=True)
FIGURES = {"kernel": KERNEL_FIGURES, "step": DECODER_FIGURES, "image": DECODER_FIGURES, "serve": SERVE_FIGURES}


def record(kind: str, machine: dict[str, Any], point: dict[str, Any], contender: dict[str, Any],
           **result: Any) -> Record:
    """A line of a result file.

    Args:
        kind: "kernel", "step", "image" or "serve". machine: `machine.facts`. point: what was benchmarked.
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
        ValueError: no regular file, or a line that ssd-bench of this format did not write; the message names file,
            line and field.
    """
    found = []
    for path in paths:
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"{path} holds no .jsonl file")
        for file in files:
            for line, value in read_json_lines(file, LARGEST):
                with naming(f"{file}, line {line}"):
                    found.append(_checked(Field(value)))
    return found


def _checked(line: Field) -> Record:
    head = line.members(("format", "version"), None)
    head["format"].choice([FORMAT])
    head["version"].choice([VERSION])
    members = line.members(("kind", "machine", "point", "contender", "status", "seconds"), None)
    kind = members["kind"].choice(list(POINTS))
    for name, check in (("machine", MACHINE), ("point", POINTS[kind]), ("contender", CONTENDERS[kind])):
        check(members[name])
    contender = members["contender"].members(("name",), None)
    if members["status"].string() != OK:
        if members["seconds"].value is not None:
            members["seconds"].refuse(f"null without the status {OK!r}")
    else:
        FIGURES[kind](line)
        if "does" not in contender and kind == "kernel":
            raise ValueError("contender.does is missing")
        if "backend" in contender and contender["backend"].value is not None:
            OURS(members["contender"])
            if kind == "kernel" and "scored" not in contender:
                raise ValueError("contender.scored is missing")
    checked: Record = line.value
    return checked


def differing(lines: Iterable[Record], names: Iterable[str] = SAME_RUN) -> dict[str, list[str]]:
    """What of the machines differs among records: its values as text, sorted, by its name."""
    abouts = [line["machine"] for line in lines]
    values = {name: sorted({str(about.get(name)) for about in abouts}) for name in names}
    return {name: found for name, found in values.items() if len(found) > 1}


def key(line: Record) -> tuple[str, str, str]:
    """What makes two records the same measurement: kind, point and contender, as text."""
    return line["kind"], json.dumps(line["point"], sort_keys=True), line["contender"]["name"]


def left_out(kind: str, machine: dict[str, Any], point: dict[str, Any], why: str) -> Record:
    """The record that stands for all contenders at a point that was not measured."""
    return record(kind, machine, point, {"name": "all contenders", "does": "", "omits": "", "backend": None},
                  status=f"{LEFT_OUT}: {why}", seconds=None)


def measured(lines: Iterable[Record]) -> list[Record]:
    """Those with a number."""
    return [line for line in lines if line["status"] == OK]

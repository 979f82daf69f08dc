"""The summary of tools/gpu_first.py: one table of goals, what was measured, and its share of the floor."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

OK = "ok"
# Rates that others have published for decoding on an H200, with the shapes, which are measured here, too.
PUBLISHED = (
    "Published for an H200: 3.98 TB/s at 32 rows x 4096 tokens x 8 KV heads x 128, and 6.1 us at 1 row x 512 tokens x "
    "16 heads x 128 (FlashInfer 9.3 us), float16, by TileOPs; attention only, without append, scores and eviction.",
)
Record = dict[str, Any]


def table(out: Path, records: dict[str, Record]) -> list[tuple[str, str, str, str]]:
    """What was asked, the goal, what was measured, and the share of the floor that memory's rate sets."""
    rows = [(part, "all", f"{counts[OK]} of {sum(counts.values())} steps ok", "")
            for part, counts in _by_part(records).items() if part in ("smoke", "graph", "memcheck", "racecheck")]
    for name in (name for name in records if name.startswith("contract ")):
        counts = Counter(line["outcome"] for line in _lines(out / f"tests-{name.partition(' ')[2]}.jsonl"))
        said = ", ".join(f"{number} {how}" for how, number in counts.items())
        rows.append((name, "all pass", said or "none ran", ""))
    times = _lines(out / "times.jsonl")
    copy = max((max(line["ceiling"].values()) for line in times if line.get("ceiling")), default=None)
    if copy:
        rows.append(("memory, the highest rate measured", "", f"{copy / 1e12:.2f} TB/s", ""))
    full = {(line["contender"]["backend"], line["point"]["batch"]): line["seconds"]["median"]
            for line in times if line["kind"] == "step" and line["seconds"] and line["contender"]["budget"] == 1}
    fastest = {_point(line): line for line in sorted(times, key=_seconds, reverse=True) if _is_rival(line)}
    for line in times:
        backend, name = line["contender"].get("backend"), line["contender"]["name"]
        if line["seconds"] is None:
            if not line["status"].startswith("not installed"):
                where = _point(line) if line["kind"] == "kernel" else f"{line['point']['batch']} at once"
                rows.append((f"{name}, {where}", "", line["status"][:120], ""))
        elif line["kind"] == "step":
            rows.append((f"{name} ({backend}), {line['point']['batch']} at once", *_engine_cells(line, copy, full)))
        elif not _is_rival(line):
            rows.append((f"{name}, {_point(line)}", *_kernel_cells(line)))
        elif line is fastest[_point(line)]:
            rows.append((f"fastest rival, {name}, {_point(line)}", *_kernel_cells(line)))
    return rows


def _point(line: Record) -> str:
    point = line["point"]
    return f"{point['batch']} x {point['heads']} heads, {point['label']}"


def _seconds(line: Record) -> float:
    return float(line["seconds"]["median"]) if line["seconds"] else 0.0


def _is_rival(line: Record) -> bool:
    return line["kind"] == "kernel" and line["seconds"] is not None and not line["contender"].get("backend")


def _kernel_cells(line: Record) -> tuple[str, str, str]:
    median, batch = line["seconds"]["median"], line["point"]["batch"]
    rate = line["bytes"]["useful"] / median
    share = rate / max(line["ceiling"].values())
    goal = ""
    if line["contender"].get("backend") and batch == 256:
        goal = f"90%: {'met' if share >= 0.9 else 'missed'}"
    elif line["contender"].get("backend") and batch == 2:
        goal = f"5 us: {'met' if median <= 5e-6 else 'missed'}"
    return goal, f"{1e6 * median:.1f} us, {rate / 1e12:.2f} TB/s", f"{share:.0%}"


def _engine_cells(line: Record, copy: float | None, full: dict[Any, float]) -> tuple[str, str, str]:
    median, batch, peak = line["seconds"]["median"], line["point"]["batch"], line["bytes"]["peak"]
    speed = f"{batch / median:.0f} tok/s"
    before = full.get((line["contender"]["backend"], batch))
    more = f", {before / median:.2f} x full" if before and line["contender"]["budget"] != 1 else ""
    floor = line["useful_bytes"] / copy if copy else None
    return (f"floor {1e3 * floor:.2f} ms" if floor else "",
            f"{1e3 * median:.2f} ms/step, {speed}{more}, peak {peak / 1e9:.1f} GB" if peak
            else f"{1e3 * median:.2f} ms/step, {speed}{more}", f"{floor / median:.0%}" if floor else "")


def _by_part(records: dict[str, Record]) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for name, record in records.items():
        found.setdefault(name.partition(" ")[0], Counter())[record["status"]] += 1
    return found


def _lines(path: Path) -> list[Record]:
    """The JSON lines of a file, as far as they are whole; none without it."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def write(out: Path, records: dict[str, Record], versions: str) -> str:
    """Write the summary to the folder ``out``, as Markdown and with what it was made from as JSON.

    Args:
        records: of the steps that have ended, by name.
        versions: what the step of that name said.

    Returns:
        the Markdown.
    """
    rows = table(out, records)
    notes = [*(line for line in versions.splitlines() if line.startswith("NOTE:")), *PUBLISHED]
    cells = [("", "goal", "measured", "of the floor"), ("---", "---", "---", "---:"), *rows]
    troubles = [f"- {one['step']}: {one['status']}" + (f": {one['error']}" if one["error"] else "")
                for one in records.values() if one["status"] != OK]
    missing = sorted({line["contender"]["name"] for line in _lines(out / "times.jsonl")
                      if line["status"].startswith("not installed")})
    if missing:
        notes.append(f"Not installed: {', '.join(missing)}.")
    text = "\n\n".join(["; ".join(line for line in versions.splitlines() if line not in notes),
                        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells),
                        "\n".join(troubles) or "Every step is ok.", *notes]) + "\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    data = {"versions": versions.splitlines(), "steps": list(records.values()), "notes": notes,
            "table": [dict(zip(("what", "goal", "measured", "of_floor"), row, strict=True)) for row in rows]}
    (out / "summary.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return text

"""`ssd-bench report`: one self-contained HTML page of results, and the table in the README."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssd_janus.extras import needs
from ssd_kernels.files import write_atomically
from ssd_kernels.reading import read_text

from . import goals
from .plot import figures, render
from .records import LARGEST, LEFT_OUT, Record, differing
from .tables import COLUMN_NOTES, DECODER_NOTES, SERVE_NOTES, describe, machine_line, markdown, points

BEGIN, END = "<!-- kernel-table:begin -->", "<!-- kernel-table:end -->"
CAPTIONS = {
    "roofline": "Useful arithmetic against bytes read. The line is the bandwidth measured in the same run: on it, "
                "nothing is left to gain without reading less. Padding moves a contender left, slow code down.",
    "time-batch": "Time of one layer's step against the number of rows; both axes logarithmic.",
    "time-slots": "Time of one layer's step against the tokens kept per head; both axes logarithmic.",
    "memory-batch": "Memory held for one layer, what a call takes for itself included.",
    "step-breakdown": "Where a whole decoder step goes.",
    "place": "Time of a decoder step against the place in the picture: flat once a budget is full.",
}
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .3rem; }
p, li { max-width: 48rem; } .machine { font-size: .85rem; opacity: .75; max-width: none; margin: .2rem 0 .8rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid #8886; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; border-bottom: 2px solid #888; }
.text { text-align: left; white-space: normal; } td.text:first-child { min-width: 15rem; }
tr.ours td { font-weight: 600; background: #8882; } tr.none td { opacity: .65; font-style: italic; }
figure { margin: 1.6rem 0; } figure div { background: white; border-radius: 4px; padding: .4rem; overflow-x: auto; }
figure svg { max-width: 100%; height: auto; } figcaption { font-size: .9rem; max-width: 48rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; max-width: 56rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media print { body { max-width: none; } }
"""


def page(lines: Sequence[Record]) -> str:
    """The whole page; nothing in it is fetched from anywhere.

    Raises:
        ValueError: there is nothing to show.
    """
    if not lines:
        raise ValueError("there are no results to report")
    groups = sorted(points(lines), key=lambda group: group[0]["kind"] != "kernel")
    notes = COLUMN_NOTES | (DECODER_NOTES if any(line["kind"] in ("step", "image") for line in lines) else {})
    notes |= SERVE_NOTES if any(line["kind"] == "serve" for line in lines) else {}
    missing = [describe([line])[0] for line in lines if line["status"].startswith(LEFT_OUT)]
    machines = dict.fromkeys(_machine(line) for line in lines)
    parts = ["<h1>ssd-bench</h1>",
             "<p>One decode step of attention over per-head compressed caches, beside what else can do it on the same "
             "machine in the same run. A contender whose output or kept tokens are wrong gets no number.</p>",
             "<h2>Machines</h2><ul>", *(f"<li>{_text(name)}</li>" for name in machines), "</ul>",
             *([f"<p>{_text(note)}.</p>"] if (note := mixed(lines)) else ()),
             *(["<h2>Left out for lack of time</h2><ul>", *(f"<li>{_text(name)}</li>" for name in missing), "</ul>"]
               if missing else ()),
             "<h2>How to read the tables</h2><dl>",
             *(f"<dt>{_text(name)}</dt><dd>{_text(note)}</dd>" for name, note in notes.items()), "</dl>"]
    for name, figure in figures(lines).items():
        svg, caption = render(figure, "svg").decode(), _text(CAPTIONS[name])
        parts.append(f'<figure id="{name}"><div role="img" aria-label="{caption}">{svg[svg.index("<svg"):]}</div>'
                     f"<figcaption>{caption}</figcaption></figure>")
    if found := goals.rows(groups):
        parts += ["<h2>Goals</h2>", _rows(goals.COLUMNS, found, len(goals.COLUMNS))]
    parts += [_table(group) for group in groups]
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><title>ssd-bench</title>'
            f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n")


def needs_matplotlib() -> None:
    """Raises an ImportError that names the extra where `page` could not be made."""
    with needs("plot", "matplotlib"):
        import matplotlib  # noqa: F401


def mixed(lines: Sequence[Record]) -> str | None:
    """What a reader must know about results of several runs side by side; None for those of one."""
    found = [f"{name} ({', '.join(values)})" for name, values in differing(lines).items()]
    return f"results of several runs, which differ in {'; '.join(found)}" if found else None


def save(lines: Sequence[Record], path: Path) -> None:
    """Write `page`; the file appears whole or not at all."""
    text = page(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def check_page(path: Path) -> str:
    """The text of a Markdown file that `refresh` can change.

    Raises:
        OSError: it cannot be read.
        ValueError: the markers are not there, once each and in order.
    """
    text = read_text(path, LARGEST)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path} must hold {BEGIN} and then {END}, once each")
    return text


def refresh(path: Path, lines: Sequence[Record]) -> None:
    """Put the tables of ``lines`` between the markers `BEGIN` and `END` of a Markdown file.

    Raises:
        ValueError: the markers are not there, once each and in order; the file is left as it was.
    """
    text = check_page(path)
    tables = []
    for group in points(lines):
        title, columns, rows, texts = describe(group)
        aims = "".join(f"- Goal, {goal}\n" for goal in goals.sentences(group))
        tables.append(f"**{title}**\n\n{markdown(columns, rows, texts)}\n{aims}\n{machine_line(group[0])}.\n")
    before, after = text[:text.index(BEGIN) + len(BEGIN)], text[text.index(END):]
    new = f"{before}\n" + "\n".join(tables) + after
    write_atomically(path, lambda file: file.write(new.encode()))


def _table(group: Sequence[Record]) -> str:
    title, columns, rows, texts = describe(group)
    kinds = ["none" if line["status"] != "ok" else "ours" if line["contender"].get("backend") else "" for line in group]
    aims = "".join(f"<li>Goal, {_text(goal)}</li>" for goal in goals.sentences(group))
    return (f'<h2>{_text(title)}</h2><p class="machine">{_text(machine_line(group[0]))}<br><code>'
            f"{_text(group[0]['machine']['command'])}</code></p>" + _rows(columns, rows, texts, kinds)
            + (f"<ul>{aims}</ul>" if aims else ""))


def _rows(columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int, kinds: Sequence[str] = ()) -> str:
    head = "".join(_cell("th", name, number < texts) for number, name in enumerate(columns))
    body = []
    for row, kind in zip(rows, kinds or [""] * len(rows), strict=True):
        cells = "".join(_cell("td", cell, number < texts) for number, cell in enumerate(row))
        body.append(f'<tr class="{kind}">{cells}</tr>')
    return (f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n' + "\n".join(body)
            + "\n</tbody></table></div>")


def _machine(line: Record) -> str:
    about: dict[str, Any] = line["machine"]
    cpu = (f"{about['processor']}, {about['cores']} cores, {about['memory_bytes'] / 2**30:.0f} GB, "
           f"{about['instruction_set']}, {about['threads']} threads")
    gpu = f"; {about['gpu']}, driver {about['driver']}, CUDA {about['cuda']}" if about.get("gpu") else ""
    return (f"{cpu}{gpu}; Python {about['python']}, torch {about['torch']}, ssd_kernels {about['ssd_kernels']}, commit "
            f"{about['commit']}")


def _cell(tag: str, text: str, left: bool) -> str:
    return f'<{tag} class="text">{_text(text)}</{tag}>' if left else f"<{tag}>{_text(text)}</{tag}>"


def _text(value: object) -> str:
    return html.escape(str(value))

"""Results of several plans side by side: as a table, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssd_kernels.reading import read_text

from ..files import write_text
from .fidelity import Fidelity
from .folder import LARGEST
from .quality import Quality

Result = Quality | Fidelity


def columns(results: Mapping[str, Result], shares: Mapping[str, float] | None = None
            ) -> tuple[list[str], list[list[str]]]:
    """Headings and one row of cells per plan; all results must be of one suite.

    ``shares``, where plans store in several formats: of each plan, of the bytes that a full cache takes for the
    picture's tokens.
    """
    first = next(iter(results.values()))
    if isinstance(first, Quality):
        own = ["overall", *(name.replace("_", " ") for name in first.families)]
    else:
        own = ["KL mean", "KL p99", "agreement", "head error", "PSNR dB", "SSIM"]
    rows = [[name, f"{result.budget:.1%}", *([] if shares is None else [f"{shares[name]:.1%}"]), str(result.pictures),
             *(_quality(result) if isinstance(result, Quality) else _fidelity(result))]
            for name, result in results.items()]
    return ["plan", "budget", *([] if shares is None else ["bytes"]), "pictures", *own], rows


def _quality(result: Quality) -> list[str]:
    return [str(result.overall), *map(str, result.families.values())]


def _fidelity(result: Fidelity) -> list[str]:
    errors = [error for layer in result.head_error for error in layer]
    return [_kl(result), f"{result.kl_p99:.3f}",
            f"{result.agreement:.2%}", f"{sum(errors) / len(errors):.3f}",
            *(("", "") if result.ssim is None else
              ("equal" if result.psnr_db is None else f"{result.psnr_db:.1f}", f"{result.ssim:.3f}"))]


def _kl(result: Fidelity) -> str:
    interval = result.kl_interval
    return f"{result.kl_mean:.4f}" + (f" [{interval.low:.4f}, {interval.high:.4f}]" if interval else "")


def markdown(results: Mapping[str, Result], shares: Mapping[str, float] | None = None) -> str:
    """A table for a page; args as of `columns`."""
    return markdown_table(*columns(results, shares))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table whose first ``texts`` columns are aligned to the left and the others to the right."""
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return "".join(f"| {' | '.join(map(_cell, cells))} |\n" for cells in lines)


def _cell(text: str) -> str:
    """A text that stays in its cell and is no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def write(results: Mapping[str, Result], out: Path, facts: Mapping[str, Any],
          shares: Mapping[str, float] | None = None) -> None:
    """Write ``results.json`` (figures and facts about the run) and ``table.md`` into ``out``; ``shares`` as of
    `columns`."""
    record = {**facts, "results": {name: result.as_json() for name, result in results.items()}}
    write_text(out / "results.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "table.md", markdown(results, shares))


def into_page(results: Mapping[str, Result], page: Path, name: str, shares: Mapping[str, float] | None = None) -> None:
    """Replace what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a Markdown page by the table.

    Args: as of `columns`, and the page and the name.

    Raises:
        FileNotFoundError: no such page.
        ValueError: the page has no such pair of comments.
    """
    fill_page(page, {name: markdown(results, shares)})


def fill_page(page: Path, sections: Mapping[str, str]) -> None:
    """Replace what stands between the comments ``<!-- NAME -->`` and ``<!-- /NAME -->`` of a Markdown page.

    Args:
        page: the file.
        sections: new text by name, ending in a newline.

    Raises:
        FileNotFoundError: no such page.
        ValueError: the page lacks a pair of comments; nothing is written.
    """
    text = read_text(page, LARGEST)
    for name, content in sections.items():
        before, _, after = _split(page, text, name)
        text = f"{before}{content}{after}"
    write_text(page, text)


def check_page(page: Path, names: Iterable[str]) -> None:
    """Raises as `fill_page` with sections of these names, and writes nothing."""
    text = read_text(page, LARGEST)
    for name in names:
        _split(page, text, name)


def _split(page: Path, text: str, name: str) -> tuple[str, str, str]:
    """The text up to the opening comment, between the comments, and from the closing one on."""
    before, opened, rest = text.partition(f"<!-- {name} -->\n")
    content, closed, after = rest.partition(f"<!-- /{name} -->")
    if not (opened and closed):
        raise ValueError(f"{page} must have the lines <!-- {name} --> and <!-- /{name} -->")
    return before + opened, content, closed + after

"""Pictures and their tokens as rows of Parquet files, one file per unit of work."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssd_kernels.files import sweep
from ssd_kernels.reading import shown

from .extras import needs
from .images import png
from .layouts import Facts, Found, Layout, Painted, difference
from .prompts import FilePrompt

NAME = re.compile(r"(\d{8,18})-(\d{8,18})\.parquet")  # the numbers of the first and the last prompt
MARK = b"ssd_janus"  # key of a file's metadata
COLUMNS = ("number", "image", "seed", "prompt", "metadata", "tokens", "png", "settings")


class Parquet(Layout):
    """``00000000-00000003.parquet`` ...: the pictures of the prompts 0 to 3, a row each.

    Columns: ``number`` of the prompt and ``image`` among its pictures, from 0; ``seed``; ``prompt`` and its
    ``metadata``, a JSON object as in GenEval's files; visual ``tokens``; ``png``, the bytes of a PNG file;
    ``settings``, what the picture was drawn with, a JSON object. (number, image, seed) is there once.

    A file is kept when every row is as it would be drawn, and otherwise drawn anew as a whole.
    """

    usual_images = 1
    together = True

    def __init__(self, out: Path, images: int | None = None) -> None:
        """
        Raises:
            ImportError: pyarrow is missing; the message names the extra.
        """
        with needs("ray", "pyarrow"):
            import pyarrow.parquet  # noqa: F401
        super().__init__(out, images)

    def homes(self, painted: Sequence[Painted]) -> list[Path]:
        return [self._file(painted)] * sum(len(own.pictures) for own in painted)

    def encode(self, painted: Sequence[Painted]) -> Iterator[tuple[Path, bytes]]:
        if painted:
            yield self._file(painted), encode(painted)

    def examine(self, prompts: Sequence[FilePrompt], facts: Mapping[int, Facts], size: Callable[[], tuple[int, int]],
                own: Container[int] | None = None) -> Found:
        """As `layouts.examine`; the contents of files are held against their checksums."""
        found, known = Found(), {prompt.number: prompt for prompt in prompts}
        sweep(self.out)
        for file in self._there():
            first = _first(file)
            if first not in known or _marked(file) is False:
                found.strangers.append(file)
                continue
            here = own is None or first in own
            try:
                rows = read(file, ("number", "image", "seed", "prompt", "metadata", "settings"), whole=here)
            except ValueError as error:
                if here:
                    found.damaged.append(str(error))
                    found.stale.append(file)
                continue
            numbers = {row["number"] for row in rows}
            if not numbers <= known.keys():
                found.strangers.append(file)
            elif line := _differing(file, rows, known, facts):
                (found.differing if here else found.elsewhere).append(line)
                found.stale += [file] if here else []
            elif line := _damage(file, rows, facts, self.images, found.done):
                found.damaged += [line] if here else []
                found.stale += [file] if here else []
            else:
                found.done |= numbers
        return found

    def missing(self, prompts: Sequence[FilePrompt], facts: Mapping[int, Facts]) -> list[Path]:
        done: set[int] = set()
        for file in self._there():
            with suppress(ValueError):
                done |= {row["number"] for row in read(file, ("number",), whole=False)}
        return [self.out / f"{prompt.number:08d}" for prompt in prompts if prompt.number not in done]

    def drawn_here(self, file: Path) -> bool:
        return bool(_marked(file))

    def _there(self) -> list[Path]:
        files = sorted(self.out.glob("*.parquet"))
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file} must be a file, or not there")
        return files

    def _file(self, painted: Sequence[Painted]) -> Path:
        return self.out / f"{painted[0].prompt.number:08d}-{painted[-1].prompt.number:08d}.parquet"


def encode(painted: Sequence[Painted]) -> bytes:
    """Rows as the contents of a Parquet file; the same ones for the same pictures."""
    import pyarrow
    import pyarrow.parquet

    rows = [(own.prompt.number, image, own.seed + image, own.prompt.text, json.dumps(own.prompt.metadata),
             own.tokens[image].tolist(), png(picture, own.facts), json.dumps(own.facts))
            for own in painted for image, picture in enumerate(own.pictures)]
    table = pyarrow.table([list(column) for column in zip(*rows, strict=True)], schema=schema())
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, compression="zstd", write_page_checksum=True,
                                use_dictionary=["prompt", "metadata", "settings"])
    return file.getvalue()


def schema() -> Any:
    """The pyarrow schema of the rows."""
    import pyarrow

    kinds = {"number": pyarrow.int64(), "image": pyarrow.int32(), "seed": pyarrow.int64(), "prompt": pyarrow.string(),
             "metadata": pyarrow.string(), "tokens": pyarrow.list_(pyarrow.int32()), "png": pyarrow.binary(),
             "settings": pyarrow.string()}
    return pyarrow.schema([pyarrow.field(name, kinds[name], nullable=False) for name in COLUMNS], {MARK: b"pictures"})


def read(file: Path, columns: Sequence[str] = COLUMNS, *, whole: bool = True) -> list[dict[str, Any]]:
    """Some columns of a file.

    Args:
        file: of `encode`.
        columns: their names.
        whole: hold all of the file against its checksums, not only these columns.

    Raises:
        ValueError: it is damaged, or no such file; the message names it.
    """
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file, columns=None if whole else list(columns), partitioning=None,
                                           page_checksum_verification=True)
        if whole and not table.schema.equals(schema()):
            raise ValueError(f"its columns are {', '.join(table.column_names)}")
        rows: list[dict[str, Any]] = table.select(list(columns)).to_pylist()
    except Exception as error:  # pyarrow raises many kinds
        raise ValueError(f"{file} is damaged: {' '.join(str(error).split())[:100]}") from None
    return rows


def _first(file: Path) -> int | None:
    match = NAME.fullmatch(file.name)
    return int(match[1]) if match else None


def _marked(file: Path) -> bool | None:
    """Whether a Parquet file was written here; None where it cannot be read."""
    import pyarrow.parquet

    try:
        return MARK in (pyarrow.parquet.read_schema(file).metadata or {})
    except Exception:  # pyarrow raises many kinds
        return None


def _differing(file: Path, rows: Sequence[Mapping[str, Any]], known: Mapping[int, FilePrompt],
               facts: Mapping[int, Facts]) -> str:
    """How rows differ from what they would be; empty where they do not."""
    for row in rows:
        found: dict[str, Any] = {}
        for name in ("settings", "metadata"):
            with suppress(ValueError):
                found[name] = json.loads(row[name])
        settings, metadata = found.get("settings"), known[row["number"]].metadata
        if not isinstance(settings, dict):
            return f"{file} does not say what it was drawn with"
        if line := difference(file, settings, facts[row["number"]]):
            return line
        if found.get("metadata") != metadata:
            return f"{file} has other metadata ({shown(found.get('metadata'))} there, {shown(metadata)} now)"
    return ""


def _damage(file: Path, rows: Sequence[Mapping[str, Any]], facts: Mapping[int, Facts], images: int,
            done: set[int]) -> str:
    """What rows are missing or too many; empty where none are."""
    numbers = sorted({row["number"] for row in rows})
    keys = [(row["number"], row["image"], row["seed"], row["prompt"]) for row in rows]
    wanted = [(number, image, facts[number]["seed"] + number * images + image, facts[number]["prompt"])
              for number in numbers for image in range(images)]
    if not rows or keys != wanted:
        return f"{file} must hold {images} pictures of every prompt, by their numbers and seeds"
    if twice := done.intersection(numbers):
        return f"{file} holds prompt {min(twice) + 1} a second time"
    return ""

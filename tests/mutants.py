"""Spoiled files for the tests of whatever reads files, and what every reader must do with them."""

from __future__ import annotations

import copy
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ODD_VALUES = (None, True, -1, 0.5, 2**70, 1e308, "x" * 5000, [], [[]], {}, {"a": 1})


def spoiled(data: bytes, count: int = 200) -> Iterator[bytes]:
    """Files cut short, with bits flipped, bytes put in, left out or doubled."""
    chance = random.Random(0)
    yield from (b"", b"\0", b"null", b"[]", b"{}", b'"', b"\xff\xfe", data + data, data[:-1], b"[" * 100_000)
    for _ in range(count):
        place, length = chance.randrange(len(data)), chance.randrange(1, 40)
        yield chance.choice((
            data[:place],
            data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1:],
            data[:place] + chance.randbytes(length) + data[place:],
            data[:place] + data[place + length:],
            data[:place + length] + data[place:]))


def wrong_values(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Copies of a JSON value with one place changed to another type, taken out or added, and which place that is."""
    def changed(change: Callable[[Any], None]) -> Any:
        other = copy.deepcopy(value)
        change(other)
        return other

    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in inside:
        for odd in ODD_VALUES:
            if type(odd) is not type(member) and {type(odd), type(member)} != {int, float}:
                yield (*at, key), changed(lambda other: other.__setitem__(key, odd))  # noqa: B023
        if isinstance(value, dict):
            yield (*at, key, "removed"), changed(lambda other: other.pop(key))  # noqa: B023
        for place, other in wrong_values(member, (*at, key)):
            yield place, changed(lambda copied: copied.__setitem__(key, other))  # noqa: B023
    if isinstance(value, dict):
        yield (*at, "unknown"), {**value, "unknown": 1}


def refused(read: Callable[[Path], Any], file: Path) -> str | None:
    """What `read` says against a file: one line that names it or its folder. None if it takes the file."""
    try:
        read(file)
    except ValueError as error:
        text = str(error)
        assert str(file.parent) in text and "\n" not in text and len(text) < 500 + len(str(file)), text
        return text
    return None


def check_reader(read: Callable[[Path], Any], file: Path, mutants: Iterable[bytes]) -> int:
    """Let ``read`` read every mutant: it returns or refuses in one line. Returns how many it refused."""
    before = file.read_bytes()
    found = 0
    for mutant in mutants:
        file.write_bytes(mutant)
        found += refused(read, file) is not None
    file.write_bytes(before)
    assert refused(read, file) is None, "the file as it was"
    return found


def check_json_reader(read: Callable[[Path], Any], file: Path, free: str = "", most: int = 500,
                      line: bool = False) -> None:
    """Let ``read`` read spoiled bytes, wrong values and odd kinds of files in the place of a JSON file.

    Args:
        read: of the path; ``file`` itself must be readable.
        free: regular expression of the places that may be so, such as ``grid[.]a[.]note[.]removed|.*[.]unknown``.
        most: wrong values to try, spread over all.
        line: whether the file holds a JSON value a line, of which the last is changed.
    """
    data = file.read_bytes()
    assert check_reader(read, file, spoiled(data)) > 100
    lines = data.splitlines() if line else [data]
    wrong = list(wrong_values(json.loads(lines[-1])))
    chosen = wrong[::max(1, len(wrong) // most)]
    for place, value in chosen:
        file.write_bytes(b"\n".join([*lines[:-1], json.dumps(value).encode()]))
        said, name = refused(read, file), ".".join(map(str, place))
        assert said is not None or re.fullmatch(free, name), f"{name} was accepted in {str(value)[:200]}"
    for text in (b'{"a": NaN}', b'{"a": 1e999}', b'{"a": 1, "a": 2}', b"9" * 5000, b"[" * 5000 + b"]" * 5000):
        file.write_bytes(text)
        assert refused(read, file) is not None, text[:80]
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)):
        file.unlink()
        make(file)
        with pytest.raises((ValueError, OSError)) as caught:
            read(file)
        assert file.name in str(caught.value)
        os.rmdir(file) if file.is_dir() else file.unlink()
        file.write_bytes(data)

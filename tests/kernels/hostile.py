"""Mutants of valid files: what accidents and malice make of them."""

from __future__ import annotations

import copy
import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# What may stand in place of any value of a JSON file.
STRANGERS: tuple[Any, ...] = (
    None, True, False, 0, -1, 3, 2**31, 2**63, 10**19, -10**19, 0.5, -0.0, 1e308, 5e-324, "", "full", "x" * 10_000,
    "\x00\n\x1b[31m", "\u202e", [], [[]], [[0, 2**40]], [0] * 1000, {}, {"kind": "full"}, {"": 0}, {"\n": {"x": []}})
LITERALS = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b'"\\ud800"', b'{"a":1,"a":2}',
            b"'a'", b"\xff", b"\xef\xbb\xbf", b"\x00", b"//", b"0x10", b"01", b"")


def damaged_bytes(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """``count`` copies of ``data`` with bits turned over, cut short, doubled, or with pieces moved or overwritten."""
    draw = random.Random(seed)
    for _ in range(count):
        mutant, at = bytearray(data), draw.randrange(len(data))
        length = draw.choice((1, 2, 8, 64, 4096))
        kind = draw.randrange(6)
        if kind == 0:
            for _ in range(draw.choice((1, 3, 30))):
                mutant[draw.randrange(len(mutant))] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del mutant[at:]
        elif kind == 2:
            del mutant[at:at + length]
        elif kind == 3:
            mutant[at:at] = mutant[:length]
        elif kind == 4:
            mutant[at:at + length] = draw.randbytes(length)
        else:
            mutant[at:at + draw.choice((0, 1, 8))] = draw.choice(LITERALS)
        yield bytes(mutant)


def damaged_values(value: Any, count: int, seed: int = 0, most: int = 3) -> Iterator[Any]:
    """``count`` copies of a JSON value in which up to ``most`` places hold something else, are gone or are renamed."""
    draw = random.Random(seed)
    for _ in range(count):
        mutant = copy.deepcopy(value)
        for _ in range(draw.randint(1, most)):
            places = list(_places(mutant))
            if not places:
                break
            holder, key = draw.choice(places)
            kind = draw.randrange(6)
            if kind == 0:
                del holder[key]
            elif kind == 1 and isinstance(holder, dict):
                holder[draw.choice(("", "size", "kind", "x" * 1000, "\n"))] = holder.pop(key)
            elif kind == 2 and isinstance(holder, list):
                holder.extend(holder * 2)
            elif kind == 3:
                other, name = draw.choice(places)
                holder[key] = copy.deepcopy(other.get(name) if isinstance(other, dict) else (*other, None)[name])
            else:
                holder[key] = draw.choice(STRANGERS)
        yield mutant


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def load_or_refuse(load: Callable[[Path], Any], path: Path, content: bytes) -> Any:
    """What ``load`` makes of a file of this content, or None when it refuses it as it should: in one short line."""
    path.write_bytes(content)
    try:
        return load(path)
    except (ValueError, TypeError) as error:
        text = str(error)
        assert text.startswith(f"{path}: ") and text.isprintable() and len(text) - len(str(path)) < 300 - 40, text
        return None


def peak_of(call: Callable[[], Any]) -> int:
    """The most bytes that Python held while ``call`` ran, ValueErrors included."""
    tracemalloc.start()
    try:
        call()
    except ValueError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def refused(load: Callable[[Path], Any], path: Path, content: bytes, words: str) -> None:
    """Assert that ``load`` refuses such a file, in one line, with these words."""
    with pytest.raises(ValueError, match=words):
        load_or_refuse(load, path, content) or load(path)

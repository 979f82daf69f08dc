"""Reading files that may hold anything: bounded, without waiting, and refused in one line that names file and field."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

__all__ = ["Field", "naming", "parse_json", "read_bytes", "read_json", "read_json_lines", "read_text", "regular_file",
           "shown"]

LONGEST_SHOWN = 60  # characters of a value in a message
LONGEST_MESSAGE = 240  # characters, what it begins with not counted
DEEPEST = 64  # lists and objects inside each other
MOST_MARKS = 2**22  # brackets, commas, quotes and backslashes, by which memory goes, not by bytes
LARGEST = sys.float_info.max
MOST_DIGITS = 20  # of an integer: more than 64 bits take
KINDS_OF_FILES = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
                  stat.S_IFSOCK: "a socket"}
STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]+|\\.)*"?|[\[{]|[\]}]', re.DOTALL)

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LONGEST_SHOWN


def shown(value: object) -> str:
    """``value`` as a message shows it: its repr on one line, in at most 60 characters."""
    if isinstance(value, int) and value.bit_length() > 4 * LONGEST_SHOWN:
        return f"an int of {value.bit_length()} bits"
    text = " ".join(_SHORT.repr(value).split())
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN - 3]}..."


@contextmanager
def naming(where: str | os.PathLike[str]) -> Iterator[None]:
    """Put ``where`` in front of the TypeErrors and ValueErrors of the block, as ValueErrors of one line; OSErrors that
    name no file name it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fsdecode(where)) from error
    except (TypeError, ValueError) as error:
        text = _one_line(str(error))
        short = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE - 3]}..."
        raise ValueError(f"{_one_line(os.fsdecode(where))}: {short}") from error


def regular_file(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor. Nothing else is opened, so that nothing can wait.

    Raises:
        OSError: the file cannot be opened; FileNotFoundError if there is none.
        ValueError: a folder, FIFO, device or socket.
    """
    path = os.fsdecode(path)
    with naming(path):
        _check_regular(os.stat(path).st_mode)
        flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK", "O_NOCTTY"))
        handle = os.open(path, flags)
        try:
            _check_regular(os.fstat(handle).st_mode)  # the name may stand for another file by this time
        except ValueError:
            os.close(handle)
            raise
        return handle


def read_bytes(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """The bytes of a regular file of at most ``max_bytes``.

    Raises:
        OSError, ValueError: as `regular_file`, or the file is larger.
    """
    with open(regular_file(path), "rb") as file, naming(path):
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > max_bytes else file.read(size + 1)  # reading takes the memory that it is asked for
        while size < len(data) <= max_bytes and (more := file.read(min(len(data), max_bytes + 1 - len(data)))):
            data += more  # it grew, or the system does not tell its size
        if max(size, len(data)) > max_bytes:
            raise ValueError(f"must be a file of at most {max_bytes} bytes, got {max(size, len(data))}")
        return data


def read_text(path: str | os.PathLike[str], max_bytes: int) -> str:
    """The text of a regular file of at most ``max_bytes`` bytes of UTF-8, without its byte order mark.

    Raises:
        OSError, ValueError: as `read_bytes`, or it is not UTF-8.
    """
    data = read_bytes(path, max_bytes)
    with naming(path):
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise ValueError(f"must be UTF-8, got byte 0x{data[error.start]:02x} in line {line}") from None


def read_json(path: str | os.PathLike[str], max_bytes: int) -> Any:
    """The one JSON value that a file of at most ``max_bytes`` bytes holds.

    Raises:
        OSError, ValueError: as `read_text`, or as `parse_json`.
    """
    text = read_text(path, max_bytes)
    with naming(path):
        return parse_json(text)


def read_json_lines(path: str | os.PathLike[str], max_bytes: int) -> list[tuple[int, Any]]:
    """The JSON values of a file that holds one a line, each with the number of its line; blank lines are left out.

    Raises:
        OSError, ValueError: as `read_text`, or as `parse_json` with the number of the line.
    """
    values = []
    for number, line in enumerate(read_text(path, max_bytes).split("\n"), 1):
        if line.strip():
            with naming(f"{os.fsdecode(path)}, line {number}"):
                values.append((number, parse_json(line)))
    return values


def parse_json(text: str) -> Any:
    """The JSON value that ``text`` describes, by the letter of the standard.

    Raises:
        ValueError: not JSON, some million values or more, nested more than 64 deep, a name twice in an object, a
            number that is not finite, an integer of more than 20 digits, or half a surrogate pair.
    """
    if sum(text.count(mark) for mark in '[{,"\\') > MOST_MARKS:
        raise ValueError(f"must hold at most {MOST_MARKS} brackets, commas, quotes and backslashes, got more")
    depth = 0
    for token in STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        if depth > DEEPEST:
            line = text.count("\n", 0, token.start()) + 1
            raise ValueError(f"must be nested at most {DEEPEST} deep, got more in line {line}")
    value = json.loads(text, object_pairs_hook=_object, parse_int=_integer, parse_float=_finite, parse_constant=_finite)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"must hold whole characters, got {shown(error.object[error.start])}") from None
    return value


@dataclass(frozen=True)
class Field:
    """A value from a file, and the name of its place there, such as ``layers[3][2].pinned``.

    Every method returns what was asked for, or raises a ValueError that names the place, the value and what is allowed.
    """

    value: Any
    name: str = ""

    def refuse(self, allowed: str) -> NoReturn:
        """Raise the ValueError that says what is ``allowed`` here."""
        raise ValueError(f"{self.name} must be {allowed}, got {shown(self.value)}".lstrip())

    def integer(self, least: int, most: int | None = None) -> int:
        """An int (no bool) within ``least`` .. ``most``."""
        if type(self.value) is not int or self.value < least or (most is not None and self.value > most):
            self.refuse(f"an int of at least {least}" if most is None else f"an int within {least} .. {most}")
        return self.value

    def number(self, least: float = -math.inf, most: float = math.inf) -> float:
        """A finite int or float (no bool) within ``least`` .. ``most``."""
        finite = type(self.value) in (int, float) and -LARGEST <= self.value <= LARGEST
        if not finite or not least <= self.value <= most:
            self.refuse("a finite number" if -least == most == math.inf else f"a number within {least} .. {most}")
        return float(self.value)

    def boolean(self) -> bool:
        """True or False."""
        if type(self.value) is not bool:
            self.refuse("true or false")
        return self.value

    def string(self, longest: int | None = None) -> str:
        """A string of at most ``longest`` characters."""
        if not isinstance(self.value, str) or (longest is not None and len(self.value) > longest):
            self.refuse("a string" if longest is None else f"a string of at most {longest} characters")
        return self.value

    def choice(self, allowed: Collection[Any]) -> Any:
        """One of ``allowed``, and of its type."""
        if not any(type(self.value) is type(one) and self.value == one for one in allowed):
            self.refuse(f"{'one of ' if len(allowed) > 1 else ''}{', '.join(map(repr, allowed))}")
        return self.value

    def items(self, least: int = 0, most: int | None = None) -> list[Field]:
        """The fields of a list of ``least`` .. ``most`` values."""
        if not isinstance(self.value, list) or len(self.value) < least or (most is not None and len(self.value) > most):
            self.refuse(f"a list{f' of at least {least}' if most is None and least else ''}"
                        f"{f' of {least} .. {most}' if most is not None else ''}")
        return [Field(value, f"{self.name}[{index}]") for index, value in enumerate(self.value)]

    def members(self, required: Collection[str] = (), optional: Collection[str] | None = ()) -> dict[str, Field]:
        """The fields of an object, by name: all of ``required``, any of ``optional`` (None: whatever there is)."""
        if not isinstance(self.value, dict):
            self.refuse("an object")
        inside = f"{self.name}." if self.name else ""
        for name in required:
            if name not in self.value:
                raise ValueError(f"{inside}{name} is missing")
        for name in self.value:
            if optional is not None and name not in required and name not in optional:
                raise ValueError(f"{self.name or 'the file'} has an unknown field {shown(name)}; it may have "
                                 f"{', '.join((*required, *optional))}")
        return {name: Field(value, f"{inside}{name}") for name, value in self.value.items()}


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ValueError(f"must be a regular file, got {KINDS_OF_FILES.get(stat.S_IFMT(mode), 'something else')}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        (name, count), = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"must name each field of an object once, got {shown(name)} {count} times")
    return value


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"must hold integers of at most {MOST_DIGITS} digits, got one of {len(digits.lstrip('-'))}")
    return int(digits)


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"must hold finite numbers, got {shown(number)}")
    return value

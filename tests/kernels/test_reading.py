"""`ssd_kernels.reading`: files that may hold anything are read, or refused in one line, without waiting."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssd_kernels import reading
from ssd_kernels.reading import Field, naming, parse_json, read_bytes, read_json, read_json_lines, read_text, shown

READERS: tuple[Callable[[str, int], object], ...] = (read_bytes, read_text, read_json, read_json_lines)
each_reader = pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)


def refusal(call: Callable[[], object]) -> str:
    """The message of the ValueError that ``call`` raises: one short line."""
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert len(text.partition(": ")[2]) < 250 and text.isprintable(), text
    return text


def test_needs_no_torch() -> None:
    """What reads prompts and results need not wait for torch."""
    script = (f"import importlib.util as u, sys; s = u.spec_from_file_location('reading', {reading.__file__!r}); "
              "m = u.module_from_spec(s); sys.modules['reading'] = m; s.loader.exec_module(m); "
              "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", script], check=True)


@each_reader
@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "socket", "link-to-fifo"])
def test_only_regular_files_are_opened(tmp_path: Path, read: Callable[[str, int], object], kind: str) -> None:
    """A FIFO without a writer, a socket or an endless device is refused at once and by its name."""
    path = tmp_path / "odd"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            here = os.open(tmp_path, os.O_RDONLY)
            server.bind(f"/proc/self/fd/{here}/odd")  # the address of a socket holds 107 characters
            os.close(here)
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    word = {"link-to-fifo": "FIFO", "fifo": "FIFO"}.get(kind, kind)
    assert f"odd: must be a regular file, got a {word}" in refusal(lambda: read(str(path), 100))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_errors_while_reading_name_the_file() -> None:
    """Address 0 of this process's memory is not there."""
    with pytest.raises(OSError, match="/proc/self/mem"):
        read_bytes("/proc/self/mem", 100)


def test_a_file_that_turns_into_a_fifo_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened counts, not what the name stood for before; and opening it waits for no writer."""
    path = tmp_path / "plan.json"
    path.write_text("{}")
    stat = os.stat

    def swap(*args: Any, **kwargs: Any) -> os.stat_result:
        found = stat(*args, **kwargs)
        if args[0] == str(path):
            path.unlink()
            os.mkfifo(path)
        return found

    monkeypatch.setattr(os, "stat", swap)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    assert "got a FIFO" in refusal(lambda: read_bytes(path, 100))
    assert before is None or len(os.listdir("/proc/self/fd")) == before


@each_reader
def test_names_that_are_no_files(tmp_path: Path, read: Callable[[Any, int], object]) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere", 100)
    with pytest.raises(OSError):
        read("x" * 5000, 100)
    assert r"a\x00b: " in refusal(lambda: read("a\0b", 100))
    for number in (0, 3.0, None):  # 0 would be standard input
        with pytest.raises(TypeError):
            read(number, 100)
    odd = tmp_path / "two\nlines"
    odd.write_bytes(b"\xff" * 100)
    assert "two lines: must be" in refusal(lambda: read(odd, 99))


def test_sizes_are_limited(tmp_path: Path) -> None:
    """The limit counts bytes, and holds for files whose size the system does not tell."""
    path = tmp_path / "file"
    path.write_bytes(b"[" + b" " * 98 + b"]")
    assert len(read_bytes(path, 100)) == 100 and read_json(path, 100) == []
    assert "file: must be a file of at most 99 bytes, got 100" in refusal(lambda: read_json(path, 99))
    with path.open("r+b") as file:
        file.truncate(2**40)  # sparse
    assert f"at most {2**39} bytes, got {2**40}" in refusal(lambda: read_bytes(path, 2**39))  # without reading it
    path.write_bytes(b"x" * 100)
    tracemalloc.start()
    read_bytes(path, 2**39)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    if os.path.exists("/proc/self/maps"):
        assert "at most 10 bytes" in refusal(lambda: read_bytes("/proc/self/maps", 10))


def test_text_is_utf8(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("a red circle\nein grüner\r\nKreis".encode("utf-8-sig"))
    assert read_text(path, 100) == "a red circle\nein grüner\r\nKreis"
    path.write_bytes("a red circle\nein grüner".encode("latin-1"))
    assert "prompts.txt: must be UTF-8, got byte 0xfc in line 2" in refusal(lambda: read_text(path, 100))
    path.write_bytes("a red circle".encode("utf-16"))
    assert "must be UTF-8, got byte 0xff in line 1" in refusal(lambda: read_text(path, 100))


NOT_JSON = {
    "empty": ("", "line 1 column 1"),
    "words": ("{\n}\nmore", "line 3"),
    "single-quotes": ("{'a': 1}", "double quotes"),
    "nan": ("[NaN]", "finite.*NaN"),
    "infinity": ('{"a": -Infinity}', "finite.*-Infinity"),
    "overflow": ("[1e999]", "finite.*1e999"),
    "long-integer": ("[" + "9" * 5000 + "]", "20 digits.*5000"),
    "long-negative": ("[-" + "9" * 21 + "]", "20 digits.*21"),
    "same-name": ('[{"size": 1, "size": 2}]', "once.*'size' 2 times"),
    "same-name-escaped": (r'[{"a": 1, "\u0061": 2}]', "once.*'a'"),
    "long-name": ("{" + ", ".join([f'"{"x" * 10**6}": 1'] * 2) + "}", "once.*xxx"),
    "deep-lists": ("[" * 100_000, "64 deep"),
    "deep-objects": ('\n{"a":' * 65, "64 deep.*line 66"),
    "half-a-pair": (r'["\ud83d"]', "characters"),
    "half-a-pair-in-name": (r'{"\uDE00": 1}', "characters"),
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_json_is_refused(tmp_path: Path, name: str) -> None:
    """By file, and in JSON lines by line; nothing is echoed whole."""
    text, words = NOT_JSON[name]
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        parse_json(text)
    assert refusal(lambda: read_json(path, 10**7)).startswith(f"{path}: ")
    if text:
        path.write_text("\n {} \n" + text.replace("\n", " "))
        assert refusal(lambda: read_json_lines(path, 10**7)).startswith(f"{path}, line 3: ")


def test_what_json_is_read(tmp_path: Path) -> None:
    """All that the standard has and that is not out of bounds; brackets in strings do not nest."""
    values = [{"a": [1, -2.5e-3, True, None], "é": "\U0001F600 \\ \" \n"}, "[" * 1000, '\\"[' * 100, 2**64, -2**63,
              "\\ud83d", json.loads("[" * 60 + "]" * 60), [[]] * 1000, ""]
    path = tmp_path / "values"
    for ascii_only in (True, False):
        lines = [json.dumps(value, ensure_ascii=ascii_only) for value in values]
        path.write_text("\r\n\n".join(lines), encoding="utf-8-sig", newline="")
        assert read_json_lines(path, 10**6) == [(2 * n + 1, value) for n, value in enumerate(values)]
        path.write_text(json.dumps(values, ensure_ascii=ascii_only), encoding="utf-8")
        assert read_json(path, 10**6) == values
    path.write_text('"a\u2028b"\n\x0c\n', encoding="utf-8")  # neither ends a line
    assert read_json_lines(path, 100) == [(1, "a\u2028b")]


def test_values_are_shown_short() -> None:
    """At most 60 characters on one line, whatever it is, and not by way of a long repr."""
    class Odd:
        def __repr__(self) -> str:
            return "odd\n" * 1000

    for value in ("x" * 10**7, list(range(10**6)), {"a" * 1000: {"b" * 1000: [1] * 1000}}, 10**100_000, -10**5000,
                  Odd(), "line\nbreak \x1b[31m", [[[[[[[[]]]]]]]], 1e300, None, b"\0" * 10**6):
        assert len(shown(value)) <= 60 and shown(value).isprintable()
    assert [shown(value) for value in ("sparse", 3, -1.5, True, None, [1, 2], {"0": 3})] \
        == ["'sparse'", "3", "-1.5", "True", "None", "[1, 2]", "{'0': 3}"]


def test_naming_keeps_to_one_line() -> None:
    with pytest.raises(ValueError, match=r"^plan\.json: k must be 3, got 4$") as caught, naming("plan.json"):
        raise TypeError("k must be 3,\n  got 4")
    assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(ValueError) as caught, naming("a"):
        raise ValueError("long " * 1000)
    assert len(str(caught.value)) <= 250
    with pytest.raises(KeyError), naming("a"):
        raise KeyError("not about values")


ROOT = Field({"version": 1, "size": 4, "share": 0.5, "keep": True, "kind": "heavy",
              "layers": [[{"pinned": [[0, "x" * 1000]]}]]})


def test_fields_return_what_is_there() -> None:
    fields = ROOT.members({"version", "size", "share", "keep", "kind"}, {"layers", "absent"})
    assert fields["version"].choice([1]) == 1 and fields["kind"].choice(["full", "heavy"]) == "heavy"
    assert fields["size"].integer(4, 4) == 4 and fields["keep"].boolean() is True
    assert fields["kind"].string(5) == "heavy"
    assert fields["share"].number(0, 1) == 0.5 and type(fields["size"].number()) is float
    pinned = fields["layers"].items(1)[0].items(1, 1)[0].members(["pinned"])["pinned"]
    assert pinned.name == "layers[0][0].pinned" and pinned.items()[0].items(2, 2)[0].integer(0) == 0


@pytest.mark.parametrize("read, words", [
    (lambda f: f["layers"].items()[0].items()[0].members(), r"layers\[0\]\[0\] has an unknown field 'pinned'"),
    (lambda f: f["layers"].items()[0].items()[0].members(["pinned"])["pinned"].items()[0].items()[1].integer(0),
     r"layers\[0\]\[0\].pinned\[0\]\[1\] must be an int of at least 0, got 'xxx"),
    (lambda f: f["layers"].items()[0].items()[0].members(["size"], None), r"layers\[0\]\[0\].size is missing"),
    (lambda f: f["layers"].members(), r"layers must be an object, got \[\["),
    (lambda f: f["layers"].items(2), r"layers must be a list of at least 2, got"),
    (lambda f: f["layers"].items(0, 0), r"layers must be a list of 0 .. 0, got"),
    (lambda f: f["size"].items(), "size must be a list, got 4"),
    (lambda f: f["size"].integer(5), "size must be an int of at least 5, got 4"),
    (lambda f: f["size"].integer(0, 3), "size must be an int within 0 .. 3, got 4"),
    (lambda f: f["keep"].integer(0), "keep must be an int of at least 0, got True"),
    (lambda f: f["share"].integer(0), "share must be an int.*got 0.5"),
    (lambda f: f["share"].number(1), "share must be a number within 1 .. inf, got 0.5"),
    (lambda f: f["keep"].number(), "keep must be a finite number, got True"),
    (lambda f: f["kind"].number(), "kind must be a finite number, got 'heavy'"),
    (lambda f: f["version"].boolean(), "version must be true or false, got 1"),
    (lambda f: f["size"].string(), "size must be a string, got 4"),
    (lambda f: f["kind"].string(4), "kind must be a string of at most 4 characters, got 'heavy'"),
    (lambda f: f["kind"].choice(["full", "window"]), "kind must be one of 'full', 'window', got 'heavy'"),
    (lambda f: f["layers"].choice(["full"]), "layers must be 'full', got"),
    (lambda f: f["keep"].choice([1]), "keep must be 1, got True"),
])
def test_fields_refuse_by_name(read: Callable[[dict[str, Field]], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(ROOT.members(ROOT.value))
    assert len(refusal(lambda: read(ROOT.members(ROOT.value)))) < 200


def test_numbers_are_finite() -> None:
    for value in (math.nan, math.inf, -math.inf, 10**400):
        with pytest.raises(ValueError, match="x must be"):
            Field(value, "x").number()
    with pytest.raises(ValueError, match=r"^must be an object, got \[\]"):
        Field([]).members()

"""Prompt files, whatever they hold."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import pytest

from ssd_janus import Pipeline
from ssd_janus.prompts import FilePrompt, fitting, gather, read

GENEVAL = [{"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}], "prompt": "a red circle"},
           {"tag": "single_object", "include": [{"class": "heart", "count": 1}], "prompt": "a heart"}]


def file_of(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def texts(path: Path) -> list[str]:
    return [prompt.text for prompt in read(path)]


def test_every_form(tmp_path: Path) -> None:
    path = file_of(tmp_path, "geneval.jsonl", "".join(json.dumps(line) + "\n" for line in GENEVAL))
    assert [prompt.metadata for prompt in read(path)] == GENEVAL
    path = file_of(tmp_path, "plain.txt", "a red circle\n\n  a heart \n")
    assert read(path) == [
        FilePrompt("00000", "a red circle", {"prompt": "a red circle"}, False, 0, f"{path}, line 1"),
        FilePrompt("00001", "a heart", {"prompt": "a heart"}, False, 1, f"{path}, line 3")]
    path = file_of(tmp_path, "dpg.csv",
                   'item_id,text,other\nb7,"a circle,\n red",1\nb7,"a circle,\n red",2\na1,a heart,1\n')
    assert [(p.name, p.text, p.has_id, p.where) for p in read(path)] == [
        ("b7", "a circle,\n red", True, f"{path}, line 2"), ("a1", "a heart", True, f"{path}, line 6")]
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in ("x1.TXT", "x0.txt", ".hidden.txt", "notes.md"):
        file_of(folder, name, f"picture {name}\n")
    assert [(p.name, p.text, p.number) for p in read(folder)] == [("x0", "picture x0.txt", 0),
                                                                  ("x1", "picture x1.TXT", 1)]


@pytest.mark.parametrize("break_", ["\u2028", "\u2029", "\x0b", "\x0c", "\x85", "\x1c", "\x1e"])
def test_lines_end_at_newlines_only(tmp_path: Path, break_: str) -> None:
    text = f"a red{break_}circle"
    assert texts(file_of(tmp_path, "a.txt", f"{text}\r\na heart\n")) == [text, "a heart"]
    assert texts(file_of(tmp_path, "a.csv", f"item_id,text\r\n1,{text}\r\n2,a heart")) == [text, "a heart"]
    raw = json.dumps({"prompt": "a red circle"}).replace(" circle", f"{break_ if ord(break_) > 31 else ' '}circle")
    assert len(texts(file_of(tmp_path, "a.jsonl", f"{raw}\r\n{raw}\n"))) == 2
    folder = tmp_path / "folder"
    folder.mkdir()
    file_of(folder, "a.txt", f"{text}\r\nand more\n")
    assert texts(folder) == [f"{text}\nand more"]


def test_byte_order_marks_and_suffixes_in_any_case(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    assert texts(file_of(tmp_path, "a.TXT", mark + b"a heart")) == ["a heart"]
    assert texts(file_of(tmp_path, "a.JSONL", mark + b'{"prompt": "a heart"}')) == ["a heart"]
    (prompt,) = read(file_of(tmp_path, "a.Csv", mark + b"item_id,text\r\n7,a heart\r\n"))
    assert (prompt.name, prompt.text) == ("7", "a heart")


@pytest.mark.parametrize("name, data, message", [
    ("a.txt", "a heart\n".encode("utf-16"), "must be UTF-8, got byte 0xff in line 1"),
    ("a.txt", "a heart\na cœur\n".encode("latin-1", "replace") + b"\xe9", "must be UTF-8, got byte 0xe9 in line 3"),
    ("a.txt", "\n \n", "must hold prompts, got none"),
    ("a.txt", "", "must hold prompts, got none"),
    ("a.txt", "a heart\ra star", r"line 1: lines must end with \\n or \\r\\n, got a lone \\r"),
    ("a.txt", "a heart\na \x00 star", r"line 2: must be text, got U\+0000 at character 3"),
    ("a.txt", "a \x1b[31mheart", r"line 1: must be text, got U\+001B at character 3"),
    ("a.txt", "a heart\n" + "x" * 100_001, "line 2: must be at most 100000 characters long, got 100001"),
    ("a.jsonl", '{"prompt": "a"}\n{"tag": 1}\n', 'line 2: must be a JSON object with a "prompt", got'),
    ("a.jsonl", '{"prompt": "a"}\n["a"]\n', 'line 2: must be a JSON object with a "prompt", got'),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', 'line 2: must be a JSON object with a "prompt", got'),
    ("a.jsonl", '{"prompt": "a"}\n\n{broken\n', r"line 3: not JSON \(Expecting property name"),
    ("a.jsonl", '{"prompt": " "}\n', "line 1: must not be blank"),
    ("a.jsonl", '{"prompt": "a \\ud800 b"}\n', "line 1: must hold whole characters"),
    ("a.jsonl", '{"prompt": "a", "prompt": "b"}\n', "line 1: must name each field of an object once"),
    ("a.jsonl", '{"prompt": "a", "count": NaN}\n', "line 1: must hold finite numbers"),
    ("a.jsonl", '{"prompt": ' + "[" * 100_000 + "\n", "line 1: must be nested at most"),
    ("a.csv", "name,text\n1,a\n", "line 1: must have columns item_id and text, got 'name, text'"),
    ("a.csv", "item_id,text,text\n1,a,b\n", "line 1: must have columns item_id and text, got"),
    ("a.csv", "item_id,text\n1,a\n2\n", "line 3: must have 2 fields as the first line, got 1"),
    ("a.csv", "item_id,text\n1,a heart, red\n", "line 2: must have 2 fields as the first line, got 3"),
    ("a.csv", "item_id,text\n1,a\n2,\n", "line 3: must not be blank"),
    ("a.csv", 'item_id,text\n1,a\n2,"a heart\n', "line 3: not CSV"),
    ("a.csv", "item_id,text\n1," + "x" * 200_000, "line 2: not CSV .field larger than field limit"),
    ("a.csv", "item_id,text\n1,a\n2,b\n1,c\n", "line 4: item_id '1' must have one text, got another in line 2"),
    ("a.csv", "item_id,text\n", "must hold prompts, got none"),
])
def test_wrong_files_are_named(tmp_path: Path, name: str, data: str | bytes, message: str) -> None:
    path = file_of(tmp_path, name, data)
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < len(str(path)) + 300


@pytest.mark.parametrize("name", ["", "../x", "/x", "a/b", "a\\b", ".", "..", ".hidden", "a\x00", "a\nb", "n" * 251,
                                  "é" * 126, "nul", "COM1.x", "a.", "a "], ids=repr)
def test_names_stay_in_the_output_folder(tmp_path: Path, name: str) -> None:
    quoted = name.replace('"', '""')
    path = file_of(tmp_path, "a.csv", f'item_id,text\nok,a star\n"{quoted}",a heart\n')
    with pytest.raises(ValueError, match=re.escape(str(path)) + ", line 3: (item_id must be|not CSV)"):
        read(path)


def test_a_folder_names_the_file(tmp_path: Path) -> None:
    file_of(tmp_path, "a.txt", "a heart")
    file_of(tmp_path, "b.txt", " \n")
    with pytest.raises(ValueError, match=r"b\.txt: must not be blank"):
        read(tmp_path)
    file_of(tmp_path, "b.txt", b"\xff")
    with pytest.raises(ValueError, match=r"b\.txt: must be UTF-8"):
        read(tmp_path)
    (tmp_path / "b.txt").unlink()
    file_of(tmp_path, "a.TXT", "another")
    with pytest.raises(ValueError, match=r"a\.txt: must hold the same text as a\.TXT"):
        read(tmp_path)
    file_of(tmp_path, "a.TXT", "a heart\n")
    assert texts(tmp_path) == ["a heart"]
    messages: list[str] = []
    (tmp_path / "folder.txt").mkdir()
    assert [prompt.text for prompt in read(tmp_path, messages.append)] == ["a heart"]
    assert len(messages) == 1 and "folder.txt: must be a regular file, got a folder" in messages[0]


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match=f"{path}: must be a regular file"):
            read(path)
    with pytest.raises(FileNotFoundError) as caught:
        read(tmp_path / "missing.csv")
    assert caught.value.filename == str(tmp_path / "missing.csv")


def test_wrong_prompts_can_be_skipped(tmp_path: Path) -> None:
    path = file_of(tmp_path, "a.csv", "item_id,text\n../x,a star\n1,a heart\n2\n3,\n4,a ring\n")
    messages: list[str] = []
    found = read(path, messages.append)
    assert [(prompt.name, prompt.number) for prompt in found] == [("1", 1), ("4", 4)], "the others keep their numbers"
    assert [message.split(":")[0] for message in messages] == [f"{path}, line {number}" for number in (2, 4, 5)]
    with pytest.raises(ValueError, match="must hold prompts, got 1 that are wrong"):
        read(file_of(tmp_path, "b.csv", "item_id,text\n1,\n"), messages.append)


def test_prompts_come_from_one_place(tmp_path: Path) -> None:
    path = file_of(tmp_path, "a.txt", "a heart")
    with pytest.raises(ValueError, match="got both"):
        gather(["a heart"], path)
    with pytest.raises(ValueError, match="got neither"):
        gather([], None)
    assert [(prompt.text, prompt.number) for prompt in gather(["a heart", " a star"], None)] == [("a heart", 0),
                                                                                               ("a star", 1)]
    for text in ("", " \n", "a \udcff", "a \x07"):
        with pytest.raises(ValueError, match="^prompt 2: must"):
            gather(["a heart", text], None)


def test_prompts_that_are_too_long_for_the_model(folder: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(folder)
    path = file_of(tmp_path, "a.txt", "a heart\n" + "red " * 300 + "\na star\n" + "blue " * 300)
    prompts = read(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, line 2: prompts must be at most"):
        fitting(pipe, prompts)
    messages: list[str] = []
    assert fitting(pipe, prompts, messages.append) == [prompts[0], prompts[2]]
    assert [message.split(":")[0] for message in messages] == [f"{path}, line 2", f"{path}, line 4"]
    with pytest.raises(ValueError, match="a prompt that can be drawn, got none"):
        fitting(pipe, prompts[1:2], messages.append)
    assert fitting(pipe, prompts[::2]) == prompts[::2]


SEEDS = {"a.jsonl": "".join(json.dumps(line) + "\n" for line in GENEVAL).encode(),
         "a.csv": 'item_id,text\r\nb7,"a ""red"" circle, \r\nsmall"\r\na1,ein Stück\r\n'.encode(),
         "a.txt": "a red circle\r\nein Stück\n\n a heart".encode()}
PIECES = [b"\x00", b"\r", b"\n", b'"', b",", b"\\", b"{", b"]", b"\xff", b"\xc3", b"\xe2\x80\xa8", b"\xef\xbb\xbf",
          b"\\ud800", b"../", b"1e999", b"NaN", b"\x85", b"\x1b"]


@pytest.mark.parametrize("name", SEEDS)
def test_mutants_are_read_or_refused(tmp_path: Path, name: str) -> None:
    """500 files that were once right: each gives prompts that can be drawn, or one line that names the file."""
    generator = random.Random(name)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(500):
        data = bytearray(SEEDS[name])
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(data) + 1)
            change = generator.randrange(4)
            if change == 0:
                data[place:place] = generator.choice(PIECES)
            elif change == 1:
                del data[place:place + generator.randint(1, 9)]
            elif change == 2:
                data[place:place + 1] = bytes([generator.randrange(256)])
            else:
                data[place:place] = data[generator.randrange(len(data) + 1):][:40]
        path = file_of(tmp_path, name, bytes(data))
        try:
            found = read(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error) and str(error).isprintable()
            outcomes["refused"] += 1
        else:
            assert found and len({prompt.number for prompt in found}) == len(found)
            for prompt in found:
                assert prompt.text.strip() and prompt.metadata["prompt"] == prompt.text
                assert "/" not in prompt.name and prompt.name.strip(".") and prompt.name.isprintable()
                json.dumps(prompt.metadata, ensure_ascii=False).encode()
            outcomes["read"] += 1
    assert min(outcomes.values()) > 10

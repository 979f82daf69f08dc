"""Files appear whole or not at all, whatever the disk does and whenever the process is killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from ssd_kernels import files
from ssd_kernels.files import PREFIX, SUFFIX, check_file, check_folder, sweep, write_atomically


@pytest.fixture(params=["unnamed", "hidden", "hidden at last"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way to write: a file without a name, and what file systems without such files get."""
    if request.param == "hidden":
        monkeypatch.setattr(files, "_write_unnamed", lambda *_: False)
    elif request.param == "hidden at last":
        def link(*args: object, **kwargs: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(args[0]))

        monkeypatch.setattr(os, "link", link)
    return request.param


@pytest.fixture(autouse=True)
def forgotten() -> None:
    files._swept.clear()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def put(data: bytes):
    return lambda file: file.write(data)


def test_new_files_and_old_ones(way: str, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    before = os.umask(0o027)
    try:
        write_atomically(path, put(b"one"))
    finally:
        os.umask(before)
    assert path.read_bytes() == b"one" and path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    with path.open("rb") as reader:
        write_atomically(str(path), put(b"other"))
        assert reader.read() == b"one", "a reader keeps the file that it opened"
    assert path.read_bytes() == b"other" and path.stat().st_mode & 0o777 == 0o604
    (tmp_path / "link").symlink_to("a.png")
    write_atomically(tmp_path / "link", put(b"through"))
    assert path.read_bytes() == b"through" and (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["a.png", "link"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(143),
                                   OSError(errno.ENOSPC, "full")],
                         ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("old", [True, False])
def test_a_failed_write_changes_nothing(way: str, tmp_path: Path, error: BaseException, old: bool) -> None:
    path = tmp_path / "a.png"
    if old:
        path.write_bytes(b"old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, fail)
    assert names(tmp_path) == (["a.png"] if old else [])
    assert not old or path.read_bytes() == b"old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_named(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    path = tmp_path / "a.png"
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as caught:
        write_atomically(path, fail if call == "write" else put(b"x"))
    assert (caught.value.errno, caught.value.filename) == (code, str(path))
    assert names(tmp_path) == []


def test_errors_name_the_path(way: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "fifo")
    for name, kind in {"folder": IsADirectoryError, "none/a": FileNotFoundError, "file/a": NotADirectoryError,
                       "n" * 300: OSError, "fifo": OSError}.items():
        path = tmp_path / name
        with pytest.raises(kind) as caught:
            write_atomically(path, put(b"x"))
        assert caught.value.filename == str(path) and "\n" not in str(caught.value)
    with pytest.raises(OSError, match="not a regular file: '/dev/null'"):
        write_atomically("/dev/null", put(b"x"))
    with pytest.raises(OSError) as caught:
        write_atomically(tmp_path / "a", lambda file: open(tmp_path / "missing"))
    assert caught.value.filename == str(tmp_path / "missing"), "another file's error stays as it is"
    with pytest.raises(OSError, match=r"a: encoder error"):
        write_atomically(tmp_path / "a", lambda file: (_ for _ in ()).throw(OSError("encoder error")))
    assert names(tmp_path) == ["fifo", "file", "folder"]


# Without the rest of the package, which takes seconds to import.
ALONE = f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
"""
WRITER = ALONE + """
if sys.argv[2] == "hidden":
    files._write_unnamed = lambda *_: False
def write(file):
    file.write(b"half"); file.flush()
    print("writing", flush=True)
    time.sleep(60)
files.write_atomically(sys.argv[1], write)
"""


@pytest.mark.parametrize("kind", ["unnamed", "hidden"])
@pytest.mark.parametrize("old", [True, False])
def test_what_a_killed_process_leaves(tmp_path: Path, kind: str, old: bool) -> None:
    path = tmp_path / "00000.png"
    if old:
        path.write_bytes(b"old")
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), kind], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    seen = set(names(tmp_path)) - {path.name}
    sweep(tmp_path)
    assert set(names(tmp_path)) - {path.name} == seen, "its writer lives"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = set(names(tmp_path)) - {path.name}
    assert left == seen and len(left) == (kind == "hidden")
    assert all(name.startswith(PREFIX) and name.endswith(SUFFIX) and name[0] == "." for name in left)
    assert path.read_bytes() == b"old" if old else not path.exists()
    write_atomically(tmp_path / "other.png", put(b"x"))
    assert names(tmp_path) == (["00000.png"] if old else []) + ["other.png"], "the next run sweeps"


def test_sweeping_leaves_other_files_alone(tmp_path: Path) -> None:
    for name in (f"{PREFIX}1{SUFFIX}", f"{PREFIX}notes", f"a{SUFFIX}", "b.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / f"{PREFIX}2{SUFFIX}").mkdir()
    sweep(tmp_path)
    sweep(tmp_path / "missing")
    assert names(tmp_path) == sorted([f"{PREFIX}2{SUFFIX}", f"{PREFIX}notes", f"a{SUFFIX}", "b.tmp"])


FILLER = ALONE + """
path = sys.argv[1] + "/a"
files.write_atomically(path, lambda file: file.write(b"x" * 4096))
try:
    files.write_atomically(path, lambda file: file.write(bytes(10**6)))
except OSError as error:
    print(error)
print(os.listdir(sys.argv[1]), open(path).read() == "x" * 4096)
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """On a file system of its own, in a user namespace where that is allowed."""
    script = 'mount -t tmpfs -o size=16k none "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script, "sh", tmp_path, sys.executable, FILLER],
                          capture_output=True, text=True)
    if not done.stdout and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    assert done.stdout == f"[Errno 28] No space left on device: '{tmp_path}/a'\n['a'] True\n", done.stderr


def test_folders_are_checked_before_long_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    check_folder(tmp_path / "to" / "be" / "made")
    assert names(tmp_path) == ["file"]
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(NotADirectoryError) as caught:
            check_folder(path)
        assert caught.value.filename == str(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError) as caught:
        check_folder(tmp_path / "a" / "b")
    assert caught.value.filename == str(tmp_path)


def test_files_are_checked_before_long_work(tmp_path: Path) -> None:
    check_file(tmp_path / "to" / "be" / "made")
    (tmp_path / "file").write_text("")
    check_file(tmp_path / "file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for path, named in ((tmp_path / "fifo", None), (tmp_path / "link", None), (tmp_path, None),
                        (tmp_path / "file" / "a", tmp_path / "file")):
        with pytest.raises(OSError) as caught:
            check_file(path)
        assert caught.value.filename == str(named or path)
    assert names(tmp_path) == ["fifo", "file", "link"]

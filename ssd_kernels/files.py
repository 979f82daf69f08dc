"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["check_file", "check_folder", "sweep", "write_atomically"]

# Hidden, and of a kind that nobody reads: GenEval's evaluator takes whatever begins with digits and ".png" for a
# picture, globs take whatever ends like one.
PREFIX, SUFFIX = ".ssd_kernels-", ".partial"
# What file systems answer that cannot make files without a name, or cannot give them one afterwards.
NO_UNNAMED_FILES = {errno.EISDIR, errno.ENOENT, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EXDEV}
NO_SYNC = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}

_swept: set[Path] = set()


def write_atomically(path: str | os.PathLike[str], write: Callable[[IO[bytes]], Any]) -> None:
    """Call ``write(file)`` on a new binary file and put it in the place of ``path`` when that succeeds.

    Whoever reads ``path`` finds the old file or the new one, also after a crash or a kill. Where the file system can,
    the new file has no name before it is whole; elsewhere it has a hidden one, and what a killed process leaves is
    removed when the next process writes into the folder. Permissions are those of the file that is replaced, or else
    what the umask leaves. A link stays, and what it points to is replaced.

    Args:
        path: the file; its folder must exist.
        write: gets a file that can be written, read and moved in.

    Raises:
        OSError: the file cannot be written; its ``filename`` is ``path``. What ``write`` raises about other files, or
            that is no OSError, is raised as it is. The old file is then still there.
    """
    target = Path(os.path.realpath(path))
    with _naming(Path(path), target):
        mode = _mode(target)
        if target.parent not in _swept:
            sweep(target.parent)
            _swept.add(target.parent)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not _write_unnamed(folder, target.name, mode, write):
                _write_named(folder, target.name, mode, write)
        finally:
            os.close(folder)


def sweep(folder: str | os.PathLike[str]) -> None:
    """Remove unfinished files that killed processes have left in ``folder``; those of living ones stay.

    A folder that is not there or cannot be read is left alone.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        left = [entry.path for entry in entries if entry.name.startswith(PREFIX) and entry.name.endswith(SUFFIX)]
        for name in left:
            with contextlib.suppress(OSError):
                handle = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the writer lives
                    os.unlink(name)
                finally:
                    os.close(handle)


def check_folder(path: str | os.PathLike[str]) -> None:
    """Check that files can be made in the folder ``path``, or in folders yet to be made on the way to it.

    Raises:
        NotADirectoryError: something on the way is no folder.
        PermissionError: the last folder that is there cannot be written to.
    """
    folder = Path(path)
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        code = errno.EROFS if read_only else errno.EACCES
        raise OSError(code, os.strerror(code), str(folder))


def check_file(path: str | os.PathLike[str]) -> None:
    """Check that `write_atomically` can write the file ``path`` once its folder is made.

    Raises:
        OSError: as `check_folder`; or a folder, FIFO, device or socket has this name.
    """
    target = Path(os.path.realpath(path))
    check_folder(target.parent)
    with _naming(Path(path), target):
        _mode(target)


def _mode(target: Path) -> int | None:
    """Permissions of the file that is there; None where there is none."""
    try:
        found = target.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if not stat.S_ISREG(found):
        raise OSError(errno.EINVAL, "not a regular file", str(target))
    return stat.S_IMODE(found)


def _write_unnamed(folder: int, name: str, mode: int | None, write: Callable[[IO[bytes]], Any]) -> bool:
    """Write a file that has no name until it is whole; False, and nothing written, where that cannot be done."""
    try:
        handle = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o666, dir_fd=folder)
    except AttributeError:  # not Linux
        return False
    except OSError as error:
        if error.errno in NO_UNNAMED_FILES:
            return False
        raise
    with os.fdopen(handle, "w+b") as file:
        source = f"/proc/self/fd/{handle}"
        if not os.path.exists(source):
            return False
        fcntl.flock(handle, fcntl.LOCK_EX)
        _fill(file, mode, write)
        try:
            os.link(source, name, src_dir_fd=folder, dst_dir_fd=folder)
        except FileExistsError:
            # Only a file with a name can take the place of another.
            with _temporary_name(folder) as temporary:
                os.link(source, temporary, src_dir_fd=folder, dst_dir_fd=folder)
                os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            if error.errno not in NO_UNNAMED_FILES:
                raise
            file.seek(0)
            data = file.read()
            _write_named(folder, name, mode, lambda copy: copy.write(data))
    return True


def _write_named(folder: int, name: str, mode: int | None, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file with a hidden name, and rename it when it is whole."""
    with _temporary_name(folder) as temporary:
        with os.fdopen(_create(folder, temporary), "w+b") as file:
            _fill(file, mode, write)
            os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)


def _create(folder: int, name: str) -> int:
    """Make and lock a file; returns its descriptor."""
    while True:
        handle = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666, dir_fd=folder)
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # swept before it was locked


@contextlib.contextmanager
def _temporary_name(folder: int) -> Iterator[str]:
    """A hidden name that nothing has; if the block fails, what it has made of it is removed."""
    name = f"{PREFIX}{secrets.token_hex(8)}{SUFFIX}"
    try:
        yield name
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=folder)
        raise


def _fill(file: IO[bytes], mode: int | None, write: Callable[[IO[bytes]], Any]) -> None:
    write(file)
    file.flush()
    if mode is not None:
        with contextlib.suppress(OSError):  # not every file system has permissions
            os.fchmod(file.fileno(), mode)
    try:
        os.fsync(file.fileno())  # or a crash could leave the name with an empty file
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


@contextlib.contextmanager
def _naming(path: Path, target: Path) -> Iterator[None]:
    """OSErrors about the file that is being written name it, and not what stands in for it meanwhile."""
    own = {".", target.name, str(target), str(target.parent)}
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        name = error.filename
        if name is None or isinstance(name, int) or name in own or name.startswith((PREFIX, "/proc/self/fd/")):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise

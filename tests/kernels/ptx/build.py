"""The executor of PTX and the CUDA kernels' PTX, compiled once and kept in the build folder by what they are made from.

``python -m tests.kernels.ptx.build`` makes all of it; tests make what they need and find missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc"
BUILD = ROOT / "build" / "ptx"
NVCC_FLAGS = ("-ptx", "-arch=compute_80", "-std=c++17", "-O3", "-DNDEBUG", "-lineinfo")
# Every operation rounds by itself, as in PTX, and integers wrap around.
CXX_FLAGS = ("-std=c++17", "-O2", "-ftree-vectorize", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
             "-ffp-contract=off", "-fwrapv")


@cache
def compiler() -> str | None:
    """A C++ compiler, or None."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


@cache
def nvcc() -> str | None:
    """CUDA's compiler, or None."""
    return shutil.which("nvcc") or next((path for path in ("/usr/local/cuda/bin/nvcc",) if os.path.exists(path)), None)


@cache
def unsupported() -> str | None:
    """Why the executor cannot be built here, or None."""
    if not sys.platform.startswith("linux"):
        return "the executor of PTX is built on Linux only"
    return None if compiler() else "no C++ compiler"


@cache
def _processor() -> tuple[str, ...]:
    """Flags for instructions that this processor has: multiply-adds without them are slow, and as exact."""
    try:
        known = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return ()
    return tuple(f"-m{name}" for name in ("avx2", "fma") if name in known)


def _made(path: Path, make: Callable[[Path], object]) -> Path:
    """The file at ``path``: there already, or made by one process while others wait for it."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            make(partial)
            os.replace(partial, path)
    return path


def _digest(*texts: bytes | str) -> str:
    whole = hashlib.sha256()
    for text in texts:
        whole.update(text.encode() if isinstance(text, str) else text)
        whole.update(b"\0")
    return whole.hexdigest()[:16]


def _run(command: Sequence[str]) -> bytes:
    """Standard output. Raises RuntimeError with what the command said if it fails."""
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr.decode(errors='replace')[-4000:]}")
    return done.stdout


def _object(source: Path) -> Path:
    """The object file of a source, compiled unless one from the same text, all headers included, is there."""
    command = [str(compiler()), *CXX_FLAGS, *_processor(), f"-I{SOURCES}", f"-I{pybind11.get_include()}",
               f"-I{sysconfig.get_paths()['include']}", str(source)]
    text = _run([*command, "-E", "-P"])
    name = f"{source.name}.{_digest(' '.join((*CXX_FLAGS, *_processor())), text)}.o"
    return _made(BUILD / "objects" / name, lambda path: _run([*command, "-c", "-o", str(path)]))


def build_module() -> Path:
    """The executor's Python module."""
    here = Path(__file__).parent
    sources = (*sorted(here.glob("*.cpp")), SOURCES / "cuda" / "launch.cpp")
    headers = [path for folder in (here, SOURCES, SOURCES / "common", SOURCES / "cuda")
               for path in sorted(folder.glob("*.h"))]
    digest = _digest(sys.version, pybind11.__version__, " ".join((*CXX_FLAGS, *_processor())),
                     *(path.read_bytes() for path in (*sources, *headers)))

    def link(path: Path) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(_object, sources))
        _run([str(compiler()), "-shared", *map(str, objects), "-o", str(path)])

    return _made(BUILD / digest / f"_ptx{sysconfig.get_config_var('EXT_SUFFIX')}", link)


@cache
def nvcc_version() -> str:
    """What nvcc says of itself."""
    return _run([str(nvcc()), "--version"]).decode()


def compile_cuda(name: str, sources: Path = SOURCES) -> str:
    """The PTX that nvcc makes of ``cuda/NAME.cu`` in ``sources``: csrc, or a changed copy of it."""
    return _run([str(nvcc()), *NVCC_FLAGS, f"-I{sources}", str(sources / "cuda" / f"{name}.cu"), "-o", "-"]).decode()


def cuda_ptx(name: str) -> str:
    """`compile_cuda` of csrc, kept."""
    read = [path for folder in ("common", "cuda") for path in sorted((SOURCES / folder).iterdir())
            if path.suffix in (".h", ".cuh") or path.name == f"{name}.cu"]
    digest = _digest(nvcc_version(), " ".join(NVCC_FLAGS), *(path.read_bytes() for path in read))
    return _made(BUILD / "cuda" / f"{name}.{digest}.ptx", lambda path: path.write_text(compile_cuda(name))).read_text()


CUDA_MODULES = ("decode_f32", "decode_bf16", "decode_f16", "decode_i8", "prefill")


@cache
def module() -> ModuleType:
    """The executor, without any PTX."""
    spec = importlib.util.spec_from_file_location("_ptx", build_module())
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    if reason := unsupported():
        sys.exit(f"{reason}: nothing built")
    build_module()
    for part in CUDA_MODULES if nvcc() else ():
        cuda_ptx(part)

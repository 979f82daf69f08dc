"""Builds guard.cpp, once for every release of torch, and loads it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")
BUILD = Path(__file__).resolve().parents[2] / "build" / "pretend"


def unsupported() -> str | None:
    """Why no machine can be pretended here, or None when it can."""
    if torch.cuda.is_available():
        return "there is a GPU"
    return None if _compiler() else "no C++ compiler"


def _compiler() -> str | None:
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


@cache
def load() -> ctypes.CDLL:
    """The library of guard.cpp; torch then knows of devices of the type CUDA."""
    home = Path(torch.__file__).parent
    command = [str(_compiler()), "-std=c++20", "-O1", "-fPIC", "-shared", f"-I{home / 'include'}",
               f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}", str(SOURCE), f"-L{home / 'lib'}",
               "-lc10"]
    digest = hashlib.sha256(f"{torch.__version__} {command}".encode() + SOURCE.read_bytes()).hexdigest()[:16]
    path = BUILD / f"guard.{digest}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile:\n{done.stderr[-4000:]}")
        os.replace(partial, path)
    return ctypes.CDLL(str(path))

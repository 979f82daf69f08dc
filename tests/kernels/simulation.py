"""The CUDA backend's sources on the host: built with a host compiler, run by csrc/cuda/simulator.cpp.

``python -m tests.kernels.simulation`` builds it; tests build it when they first need it, into the build folder.
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
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11
import torch

from ssd_kernels.backends.cuda import CUDABackend

ROOT = Path(__file__).resolve().parents[2]
SANITIZED = os.environ.get("SSD_SIMULATION_SANITIZED") == "1"  # needs the sanitizers' runtime in LD_PRELOAD
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
SKIPPED = "device.cu"  # the only file that calls CUDA's runtime


def compiler() -> str | None:
    """A C++ compiler, or None."""
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def build(sources: Path = ROOT / "csrc", sanitized: bool = SANITIZED, optimized: bool = True) -> Path:
    """Compile the module and return its path.

    Args:
        sources: csrc, or a changed copy of it.
        sanitized: with AddressSanitizer and UndefinedBehaviorSanitizer.
        optimized: slower to build, and faster to run.
    """
    cuda = [path for path in sorted((sources / "cuda").glob("*.c*")) if path.suffix in (".cu", ".cpp")
            and path.name != SKIPPED]
    files = [*cuda, Path(__file__).with_suffix(".cpp")]
    flags = ["-std=c++17", "-fPIC", "-DSSD_SIMULATE", f"-I{sources}", f"-I{pybind11.get_include()}",
             f"-I{sysconfig.get_paths()['include']}", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas",
             "-O1" if optimized else "-O0", *(SANITIZERS if sanitized else ())]
    read = [path for path in sorted(sources.rglob("*")) if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    text = "\0".join([*flags, sys.version, *(path.read_text() for path in [*read, files[-1]])])
    folder = ROOT / "build" / f"simulation-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    module = folder / f"_simulation{sysconfig.get_config_var('EXT_SUFFIX')}"
    with (folder / "lock").open("w") as lock:  # one process builds, the others wait for it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            _compile(files, flags, folder, module)
    return module


def _compile(files: list[Path], flags: list[str], folder: Path, module: Path) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _object(source, flags), files))
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    partial = folder / f"{module.name}.{os.getpid()}"
    subprocess.run([str(compiler()), "-shared", *sanitizers, *map(str, objects), "-o", str(partial)], check=True)
    os.replace(partial, module)


def _object(source: Path, flags: list[str]) -> Path:
    """The object file of a source, compiled unless one with the same text, all headers included, is there."""
    command = [str(compiler()), *flags, "-x", "c++", str(source)]
    text = subprocess.run([*command, "-E", "-P"], check=True, capture_output=True).stdout
    options = " ".join(flag for flag in flags if not flag.startswith("-I"))
    name = hashlib.sha256(options.encode() + text).hexdigest()[:16]
    target = ROOT / "build" / "simulation-objects" / f"{source.name}.{name}.o"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        subprocess.run([*command, "-c", "-o", str(partial)], check=True)
        os.replace(partial, target)
    return target


def load(path: Path) -> ModuleType:
    """Import the module that `build` made."""
    spec = importlib.util.spec_from_file_location("_simulation", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SimulatedCUDABackend(CUDABackend):
    """`CUDABackend` on tensors of the CPU."""

    name = "simulated_cuda"
    device_type = "cpu"

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._module: ModuleType | None = None

    def extension(self) -> ModuleType:
        if self._module is None:
            self._module = load(self.path or build())
            self._module.set_seed(int(os.environ.get("SSD_SIMULATION_SEED", "0")))
        return self._module

    def unavailable(self) -> str | None:
        return None if compiler() else "no C++ compiler"

    def _place(self, device: torch.device) -> tuple[int, int]:
        return 0, 0


@cache
def is_supported() -> bool:
    """Whether the simulation can run: on Linux, with a C++ compiler."""
    return sys.platform.startswith("linux") and compiler() is not None


if __name__ == "__main__":
    print(build())

"""Builds ssd_kernels._C from csrc/ with CMake, Ninja and pybind11.

torch is not needed, and not imported: the extension takes raw pointers, so one build serves every release of torch, and
an isolated build does not download another one.

Environment:
    SSD_KERNELS_CUDA  auto (the default) builds the CUDA backend if nvcc is found; 1 insists on it; 0 leaves it out.
    CXX               the C++ compiler; else the one that the build folder remembers, or c++, g++ or clang++.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, __version__, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
PACKAGE_DIRS = {
    "ssd_kernels": "ssd_kernels",
    "ssd_attach": "python/ssd_attach",
    "ssd_janus": "python/ssd_janus",
    "ssd_shapes": "python/ssd_shapes",
    "ssd_bench": "bench",
}
# Files and no code: pyproject.toml says which.
DATA_PACKAGES = ("ssd_janus.serve.static", "ssd_shapes.assets", "ssd_shapes.model")


def nvcc_candidates(env: Mapping[str, str]) -> list[tuple[str, str | None]]:
    """Where nvcc may be, best first: (what was looked at, the path or None)."""
    home = env.get("CUDA_HOME")
    return [
        ("CUDACXX", env.get("CUDACXX") or None),
        ("CUDA_HOME/bin/nvcc", str(Path(home, "bin", "nvcc")) if home else None),
        ("nvcc on PATH", shutil.which("nvcc", path=env.get("PATH", ""))),
        ("/usr/local/cuda/bin/nvcc", "/usr/local/cuda/bin/nvcc"),
    ]


def find_nvcc(env: Mapping[str, str]) -> tuple[str | None, str | None]:
    """nvcc as SSD_KERNELS_CUDA wants it: (its path, None), or (None, the reason for building without CUDA)."""
    switch = env.get("SSD_KERNELS_CUDA", "auto")
    if switch not in ("auto", "1", "0"):
        raise SetupError(f"SSD_KERNELS_CUDA must be auto, 1 or 0, got {switch!r}")
    if switch == "0":
        return None, "off (SSD_KERNELS_CUDA=0)"
    candidates = nvcc_candidates(env)
    for _, path in candidates:
        found = path and shutil.which(path, path=env.get("PATH", ""))
        if found:
            return found, None
    if switch == "1":
        looked = "; ".join(f"{name} ({path or 'nothing'})" for name, path in candidates)
        raise SetupError(f"SSD_KERNELS_CUDA=1, but there is no nvcc. Looked for: {looked}")
    return None, "off (no nvcc found)"


def find_compiler(env: Mapping[str, str]) -> str:
    """The C++ compiler that CMake will find: CXX, or the usual names on PATH."""
    names = shlex.split(env.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    for name in names:
        if found := shutil.which(name, path=env.get("PATH", "")):
            return found
    raise SetupError(f"ssd_kernels needs a C++17 compiler, and found none. Looked for: {', '.join(names)}. "
                     "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or set CXX.")


def remembers_another_compiler(cmake_cache: str, env: Mapping[str, str]) -> bool:
    """Whether CXX is not the compiler in the text of a CMakeCache.txt: CMake would stay with that one in silence."""
    remembered = re.search(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cmake_cache, re.MULTILINE)
    return bool(env.get("CXX")) and remembered is not None and remembered[1] != find_compiler(env)


def find_tool(name: str, env: Mapping[str, str]) -> str:
    """cmake or ninja: from the Python package of that name where this Python has it, else from PATH."""
    try:
        for file in importlib.metadata.distribution(name).files or ():
            if file.parts[-2:] == ("bin", name) and (path := Path(str(file.locate())).resolve()).is_file():
                return str(path)
    except importlib.metadata.PackageNotFoundError:
        pass
    if found := shutil.which(name, path=env.get("PATH", "")):
        return found
    raise SetupError(f"building ssd_kernels needs {name}: pip install {name}")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        find_compiler(os.environ)
        nvcc, no_cuda = find_nvcc(os.environ)
        cmake = find_tool("cmake", os.environ)
        # A fixed folder, so that rebuilds are incremental. Its cache may remember the tools of an isolated environment
        # that is gone: hence every path is passed every time.
        folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cache = folder / "CMakeCache.txt"
        fresh = cache.is_file() and remembers_another_compiler(cache.read_text(), os.environ)
        self.run_tool(cmake, *(["--fresh"] if fresh else []), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
                      f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja', os.environ)}",
                      f"-DPython_EXECUTABLE={sys.executable}",
                      f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                      "-DPYBIND11_FINDPYTHON=ON",
                      f"-DSSD_KERNELS_NVCC={nvcc or ''}",
                      f"-DSSD_KERNELS_NO_CUDA={no_cuda or ''}",
                      f"-DSSD_KERNELS_INSIST_ON_CUDA={'ON' if os.environ.get('SSD_KERNELS_CUDA') == '1' else 'OFF'}")
        self.run_tool(cmake, "--build", str(folder))
        module = Path(self.get_ext_fullpath(ext.name))
        module.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: a process that has the old module mapped must not see its bytes change.
        partial = module.with_name(module.name + ".partial")
        shutil.copy2(folder / module.name, partial)
        os.replace(partial, module)
        print((folder / "summary.txt").read_text(), end="", flush=True)

    def run_tool(self, *command: str) -> None:
        sys.stdout.flush()
        if code := subprocess.run(command).returncode:
            raise SetupError(f"{shlex.join(command)} failed with exit status {code}; its messages are above")


def packages() -> list[str]:
    found = list(DATA_PACKAGES)
    for name, folder in PACKAGE_DIRS.items():
        found += [name, *(f"{name}.{sub}" for sub in find_packages(str(ROOT / folder)))]
    return found


if __name__ == "__main__":
    if int(__version__.partition(".")[0]) < 77:  # only without build isolation; it would stumble over pyproject.toml
        raise SystemExit(f"building ssd_kernels needs setuptools>=77, found {__version__}: pip install -U setuptools")
    setup(packages=packages(), package_dir=PACKAGE_DIRS, ext_modules=[Extension("ssd_kernels._C", sources=[])],
          cmdclass={"build_ext": CMakeBuild}, zip_safe=False)

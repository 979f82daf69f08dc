"""The compiled files: code of one instruction set stays in its own file, and OpenMP is torch's."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OBJECTS = sorted((ROOT / "build" / f"cmake-{sys.implementation.cache_tag}").glob("**/csrc/cpu/kernels_*.o"))


@pytest.mark.skipif(not OBJECTS, reason="needs the build folder of this checkout")
@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm (binutils)")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_no_weak_functions(path):
    """The linker keeps one copy of a weak function (an inline or template one) for all files.

    If it keeps the copy that was compiled for AVX-512, the portable code crashes on a machine without it. So the
    kernels' helpers live in unnamed namespaces, and nothing of the standard library is instantiated there.
    """
    symbols = subprocess.run(["nm", "-C", path], check=True, capture_output=True, text=True).stdout
    assert not re.findall(r"^[0-9a-f]+ W .*", symbols, re.MULTILINE)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_one_openmp_runtime():
    """torch's libgomp, whatever compiler built the extension: clang's libomp beside it would be a second pool."""
    code = "from ssd_kernels import _C, process; print(_C.__file__, *process.openmp_runtimes(), sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    extension, *runtimes = run.stdout.splitlines()
    assert len(runtimes) == 1, runtimes
    contents = Path(extension).read_bytes()
    assert set(re.findall(rb"\0(lib\w*omp\w*\.so[.\d]*)(?=\0)", contents)) == {b"libgomp.so.1"}
    assert b"GOMP_parallel" in contents and b"__kmpc_" not in contents


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("source", ["decode", "instruction_sets", "layers", "linear", "prefill"])
def test_builds_without_openmp(source):
    """Where there is no libgomp to link with."""
    subprocess.run(["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DSSD_KERNELS_HAVE_GOMP=0",
                    "-DSSD_KERNELS_HAVE_X86=0", f"-I{ROOT / 'csrc'}", ROOT / f"csrc/cpu/{source}.cpp"], check=True)

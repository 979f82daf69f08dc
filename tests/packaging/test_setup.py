"""setup.py: where it looks for tools, what its switch accepts, and what the metadata ask of a user's machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ssd_kernels_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def no_system_cuda(setup_py, monkeypatch):
    """Leaves out /usr/local/cuda, which this machine may have."""
    candidates = setup_py.nvcc_candidates
    monkeypatch.setattr(setup_py, "nvcc_candidates",
                        lambda env: [(name, None if name.startswith("/") else path) for name, path in candidates(env)])


def test_nvcc_is_looked_for_in_order(setup_py, tmp_path):
    first = program(tmp_path / "first" / "my-nvcc")
    second = program(tmp_path / "second" / "bin" / "nvcc")
    third = program(tmp_path / "third" / "nvcc")
    env = {"CUDACXX": first, "CUDA_HOME": str(tmp_path / "second"), "PATH": str(tmp_path / "third")}
    assert setup_py.find_nvcc(env) == (first, None)
    del env["CUDACXX"]
    assert setup_py.find_nvcc(env) == (second, None)
    del env["CUDA_HOME"]
    assert setup_py.find_nvcc(env) == (third, None)
    assert setup_py.nvcc_candidates(env)[-1][1] == "/usr/local/cuda/bin/nvcc"


def test_a_place_without_nvcc_is_passed_over(setup_py, tmp_path):
    nvcc = program(tmp_path / "bin" / "nvcc")
    env = {"CUDACXX": str(tmp_path / "gone"), "CUDA_HOME": str(tmp_path / "empty"), "PATH": str(tmp_path / "bin")}
    assert setup_py.find_nvcc(env) == (nvcc, None)


@pytest.mark.usefixtures("no_system_cuda")
def test_switch(setup_py, tmp_path):
    nvcc = program(tmp_path / "bin" / "nvcc")
    there, missing = {"PATH": str(tmp_path / "bin")}, {"PATH": str(tmp_path), "CUDA_HOME": "/not/here"}
    assert setup_py.find_nvcc({**there, "SSD_KERNELS_CUDA": "1"}) == (nvcc, None)
    assert setup_py.find_nvcc({**there, "SSD_KERNELS_CUDA": "auto"}) == (nvcc, None)
    assert setup_py.find_nvcc({**there, "SSD_KERNELS_CUDA": "0"})[0] is None
    assert setup_py.find_nvcc(missing)[0] is None
    with pytest.raises(SetupError) as error:
        setup_py.find_nvcc({**missing, "SSD_KERNELS_CUDA": "1"})
    for name in ("CUDACXX", "CUDA_HOME", "/not/here/bin/nvcc", "PATH", "/usr/local/cuda"):
        assert name in str(error.value)


@pytest.mark.parametrize("value", ["yes", "on", "", "2"])
def test_switch_refuses_other_values(setup_py, value):
    with pytest.raises(SetupError, match="auto, 1 or 0"):
        setup_py.find_nvcc({"SSD_KERNELS_CUDA": value})


def test_compiler(setup_py, tmp_path):
    gxx = program(tmp_path / "g++")
    assert setup_py.find_compiler({"PATH": str(tmp_path)}) == gxx
    assert setup_py.find_compiler({"PATH": str(tmp_path), "CXX": "g++ -m64"}) == gxx
    with pytest.raises(SetupError, match=r"C\+\+17 compiler.*nonesuch"):
        setup_py.find_compiler({"PATH": str(tmp_path), "CXX": "nonesuch"})
    with pytest.raises(SetupError, match="apt install g"):
        setup_py.find_compiler({"PATH": "/nowhere"})


def test_another_compiler_than_the_build_folder_remembers(setup_py, tmp_path):
    """Or, after a build that failed, `CXX=g++-13 pip install .` would go on with the compiler that failed."""
    old, new = program(tmp_path / "g++"), program(tmp_path / "g++-13")
    cache = f"CMAKE_BUILD_TYPE:STRING=\nCMAKE_CXX_COMPILER:FILEPATH={old}\nCMAKE_CXX_COMPILER_AR:FILEPATH=/bin/ar\n"
    path = {"PATH": str(tmp_path)}
    assert setup_py.remembers_another_compiler(cache, {**path, "CXX": "g++-13"})
    assert setup_py.remembers_another_compiler(cache, {**path, "CXX": f"{new} -m64"})
    assert not setup_py.remembers_another_compiler(cache, {**path, "CXX": "g++"})
    assert not setup_py.remembers_another_compiler(cache, path)
    assert not setup_py.remembers_another_compiler("", {**path, "CXX": "g++-13"})


def test_missing_tool_is_named(setup_py):
    with pytest.raises(SetupError, match="needs no-such-tool"):
        setup_py.find_tool("no-such-tool", {"PATH": "/nowhere"})


def test_setup_does_not_import_torch(setup_py):
    assert not hasattr(setup_py, "torch")
    assert "import torch" not in (ROOT / "setup.py").read_text()


def test_every_folder_is_packaged(setup_py):
    """Each folder with an __init__.py below a package's folder is in the list, and the other way round."""
    folders = {name: ROOT / folder for name, folder in setup_py.PACKAGE_DIRS.items()}
    expected = {".".join((name, *init.parent.relative_to(folder).parts))
                for name, folder in folders.items() for init in folder.rglob("__init__.py")}
    assert set(setup_py.packages()) == expected | set(setup_py.DATA_PACKAGES)


def test_every_file_is_packaged(setup_py, tmp_path):
    """Code and data land in the build, and setuptools has nothing to say about folders that it would leave out."""
    built = subprocess.run([sys.executable, "setup.py", "egg_info", "--egg-base", tmp_path, "build_py", "--build-lib",
                            tmp_path / "lib"], cwd=ROOT, check=True, text=True, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT).stdout
    assert "ignored" not in built and "not found" not in built, built
    left_out = {"__pycache__", "results"}  # results: of our own benchmark runs
    expected = {f"{name}/{file.relative_to(ROOT / folder)}" for name, folder in setup_py.PACKAGE_DIRS.items()
                for file in (ROOT / folder).rglob("*")
                if file.is_file() and file.suffix != ".so" and not left_out & set(file.parts)}
    lib = tmp_path / "lib"
    assert {str(file.relative_to(lib)) for file in lib.rglob("*") if file.is_file()} == expected


def test_torch_is_never_pinned():
    """A user's own torch must survive the install: a lower bound, and nothing else."""
    requirements = [r for r in importlib.metadata.requires("ssd_kernels") or () if re.match(r"torch\b", r)]
    assert requirements == ["torch>=2.11"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_build_needs_no_torch_and_the_makefile_agrees():
    import tomllib

    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert not [r for r in requires if r.startswith("torch")]
    tools = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("BUILD_TOOLS"))
    assert tools.partition(":=")[2].replace("'", "").split() == requires

"""Which device the CUDA backend launches on, and what it leaves behind: csrc/cuda/device.cu on a fake runtime."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .ptx import build

pytestmark = pytest.mark.skipif(build.unsupported() is not None, reason=str(build.unsupported()))
FAKE = Path(__file__).with_name("fake_cuda")
NONE, FIRST, SECOND, BOTH = 0, 1, 2, 3  # devices with a context


@pytest.fixture(scope="module")
def launch_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, int, int]]:
    library = tmp_path_factory.mktemp("fake_cuda") / "device.so"
    subprocess.run([str(build.compiler()), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{FAKE}",
                    f"-I{build.SOURCES}", str(FAKE / "launch_on.cpp"), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).launch_on

    def launch(device: int, current: int, contexts: int, *, devices: int = 2, asks: bool = True
               ) -> tuple[int, int, int]:
        """The error, and which device is current and which have a context after a launch."""
        now, active = ctypes.c_int(current), ctypes.c_uint(contexts)
        error = function(device, ctypes.byref(now), ctypes.byref(active), devices, int(asks))
        return error, now.value, active.value

    return launch


@pytest.mark.parametrize("current", [0, 1])
def test_going_back_makes_no_context(launch_on, current):
    other = 1 - current
    assert launch_on(other, current, contexts=1 << other) == (0, other, 1 << other)
    assert launch_on(other, current, contexts=NONE) == (0, other, 1 << other)


@pytest.mark.parametrize("current", [0, 1])
def test_a_device_in_use_stays_current(launch_on, current):
    assert launch_on(1 - current, current, contexts=BOTH) == (0, current, BOTH)
    assert launch_on(1 - current, current, contexts=1 << current) == (0, current, BOTH)


@pytest.mark.parametrize("contexts", [NONE, FIRST, SECOND, BOTH])
def test_the_current_device_is_left_alone(launch_on, contexts):
    assert launch_on(1, 1, contexts) == (0, 1, contexts)


def test_without_an_answer_of_the_driver_it_goes_back(launch_on):
    assert launch_on(1, 0, contexts=BOTH, asks=False) == (0, 0, BOTH)


def test_no_such_device(launch_on):
    error, current, contexts = launch_on(2, 0, contexts=FIRST)
    assert (error, current, contexts) == (101, 0, FIRST)

"""Huge pages: what is asked of the system, and that contents stay as they are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from ssd_kernels import CompressedCache, HeadSpec
from ssd_kernels.pages import HUGE, in_huge_pages, zeros_in_huge_pages

from .cases import uniform

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CPU = torch.device("cpu")

on_linux = pytest.mark.skipif(not ENABLED.exists(), reason="Linux's huge pages")


def held(tensor: torch.Tensor) -> dict[str, str]:
    """What /proc says of the memory in the middle of a tensor."""
    middle, inside, found = tensor.data_ptr() + tensor.nbytes // 2, False, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= middle < int(match[2], 16)
        elif inside:
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return found


@on_linux
def test_weights_move_into_huge_pages_and_stay_as_they_are() -> None:
    weight = torch.randn(1500, 1024)  # of at least one whole huge page
    before, address = weight.clone(), weight.data_ptr()
    moved = in_huge_pages(weight)
    assert torch.equal(weight, before) and weight.data_ptr() == address
    assert not (moved and "[never]" in ENABLED.read_text())
    if moved:
        assert int(held(weight)["AnonHugePages"].split()[0]) >= 2048
    assert not in_huge_pages(torch.zeros(1000)) and not in_huge_pages(torch.zeros(0))


@on_linux
def test_slabs_ask_for_huge_pages() -> None:
    cache = CompressedCache(uniform(HeadSpec.full(), 4), 8, 4, 128, 24, 576, device="cpu", backend="reference")
    state = cache._layers[0]
    for slab in (state.keys, state.values):
        assert slab.nbytes > 2 * HUGE and not slab.any()
        assert "hg" in held(slab)["VmFlags"].split()


@pytest.mark.parametrize("shape", [(0,), (3,), (3, 700_001)], ids=str)
def test_zeros_are_torchs(shape: tuple[int, ...]) -> None:
    for dtype in (torch.float32, torch.int8):
        found = zeros_in_huge_pages(shape, dtype, CPU)
        assert found.dtype == dtype and found.is_contiguous() and torch.equal(found, torch.zeros(shape, dtype=dtype))
    assert zeros_in_huge_pages(shape, torch.float32, torch.device("meta")).shape == shape


def test_memory_that_was_used_before_is_zero_again() -> None:
    for _ in range(3):
        tensor = zeros_in_huge_pages((5, 1_000_003), torch.float32, CPU)
        assert not tensor.any()
        tensor.fill_(float("nan"))
        del tensor


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_nothing_is_asked(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr("ctypes.CDLL", None)
    assert not in_huge_pages(torch.zeros(2**21))
    assert not zeros_in_huge_pages((2**21,), torch.float32, CPU).any()


def test_a_refusal_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        @staticmethod
        def madvise(address: int, size: int, advice: int) -> int:
            return -1

    monkeypatch.setattr("ctypes.CDLL", lambda *given, **more: Refusing)
    assert not in_huge_pages(torch.zeros(2**21))
    assert not zeros_in_huge_pages((2**21,), torch.float32, CPU).any()

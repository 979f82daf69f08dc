"""Heads typed while a picture is drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssd_kernels import CachePlan, CompressedCache, HeadSpec
from ssd_kernels.layout import RECENT

from .cases import Case, each_backend, each_format

H, D, STEPS = 4, 32, 40
SPECS = (HeadSpec.heavy(8, 4, "mean"), HeadSpec.window(8), HeadSpec.heavy(9, 2), HeadSpec.full())


def drawn(case: Case, plan: CachePlan, recent: list[int] | None, at: int) -> tuple[list, CompressedCache]:
    """Outputs of all steps, with ``set_recent`` after step ``at``."""
    random = torch.Generator().manual_seed(0)
    cache = CompressedCache(case.stored(plan), 2, H, D, max_prompt=3, num_visual_tokens=STEPS, device=case.device,
                            backend=case.name)
    cache.prefill(0, *torch.randn(2, 2, H, 3, D, generator=random).to(case.device), [3, 2])
    outputs = []
    for step in range(STEPS):
        if step == at and recent is not None:
            cache.set_recent(0, torch.tensor(recent, device=case.device))
        outputs.append(cache.decode(0, *torch.randn(3, 2, H, D, generator=random).to(case.device)))
    return outputs, cache


@each_format
@pytest.mark.parametrize("row_buffer", [0, 4])
@pytest.mark.parametrize("at", [0, 5, 8])
def test_equals_a_plan_that_said_so_from_the_start(case: Case, row_buffer: int, at: int) -> None:
    before = CachePlan([SPECS], row_buffer)
    after = CachePlan([[replace(SPECS[0], recent=8), SPECS[1], replace(SPECS[2], recent=0), SPECS[3]]], row_buffer)
    # The window and the full head are not asked, and too large a number counts as M.
    got, cache = drawn(case, before, [100, 3, -7, 3], at)
    expected, other = drawn(case, after, None, at)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    for head in range(H):
        for a, b in zip(cache.positions(0, head), other.positions(0, head), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(got[-1], drawn(case, before, None, at)[0][-1])
    # A heavy head that protects all its tokens is a window.
    assert cache.positions(0, 0)[0].tolist()[:3] == [0, 1, 2]
    held = len(cache.positions(0, 0)[0]) - 3
    assert cache.positions(0, 0)[0].tolist()[3:] == list(range(3 + STEPS - held, 3 + STEPS))


def test_numbers_beyond_int32_count_as_the_nearest() -> None:
    cache = CompressedCache(CachePlan([SPECS]), 1, H, D, max_prompt=3)
    cache.set_recent(0, torch.tensor([2**31, 0, -2**40, 0]))
    assert cache._layers[0].table[:, RECENT].tolist() == [8, 0, 0, 0]
    cache.set_recent(0, torch.tensor([2**32 + 1, 0, 2**63 - 1, 0]))
    assert cache._layers[0].table[:, RECENT].tolist() == [8, 0, 9, 0]


@each_backend
def test_refused_once_tokens_may_be_gone(case: Case) -> None:
    with pytest.raises(ValueError, match="within 8 steps and with keep_prompt, got 9 steps"):
        drawn(case, CachePlan([SPECS]), [1, 1, 1, 1], 9)
    with pytest.raises(ValueError, match="keep_prompt=False"):
        drawn(case, CachePlan([SPECS], keep_prompt=False), [1, 1, 1, 1], 0)
    drawn(case, CachePlan([[HeadSpec.window(2)] * H]), [1, 1, 1, 1], STEPS - 10)  # nothing to change


@pytest.mark.parametrize("recent, error, message", [
    ([1, 1, 1, 1], TypeError, "recent must be a tensor, got list"),
    (torch.ones(4), TypeError, "got torch.float32"),
    (torch.ones(3, dtype=torch.int32), ValueError, r"recent must have shape \[4\] on cpu, got \[3\]"),
])
def test_bad_arguments(recent: object, error: type[Exception], message: str) -> None:
    cache = CompressedCache(CachePlan([SPECS]), 1, H, D, max_prompt=3)
    with pytest.raises(error, match=message):
        cache.set_recent(0, recent)  # type: ignore[arg-type]

"""Which ranks leave: Triton's selection beside a sort, on the executor of PTX."""

from __future__ import annotations

import pytest
import torch

from .ptx import build
from .ptx.triton import Launcher

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(build.unsupported() is not None, reason=str(build.unsupported()))

import triton.language as tl  # noqa: E402

from ssd_kernels.triton.evict import lose  # noqa: E402

BLOCK = 64
PINNED, PROTECTED = (2**31 - 1) << 32, 2**63 - 1


@triton.jit(do_not_specialize=["count", "losers"])
def lose_kernel(out, rows, count, losers, BLOCK: tl.constexpr):
    """Which of the first ``count`` ranks leave: ``rows`` int64, ``out`` int32, both [BLOCK]."""
    index = tl.arange(0, BLOCK)
    tl.store(out + index, lose(tl.load(rows + index), index < count, losers, BLOCK).to(tl.int32))


def ranks(kind: str) -> list[int]:
    random = torch.Generator().manual_seed(5)
    keys = torch.rand(BLOCK, generator=random).view(torch.int32).tolist()
    older = torch.randperm(BLOCK, generator=random).tolist()
    by_key = [key << 32 | position for key, position in zip(keys, older, strict=True)]
    return {
        "keys": by_key,
        "zeros": older,
        "extremes": [*[-2**63 + position for position in older[:20]], *[-(1 << 40) - n for n in range(20)],
                     *by_key[40:]],
        "pinned": [PINNED | position if position % 3 else key for position, key in zip(older, by_key, strict=True)],
        "protected": [PROTECTED if position % 3 else key for position, key in zip(older, by_key, strict=True)],
        "all protected": [PROTECTED] * BLOCK,
        "equal": [7 << 32 | position % 3 for position in older],
    }[kind]


@pytest.mark.parametrize("kind", ["keys", "zeros", "extremes", "pinned", "protected", "all protected", "equal"])
def test_the_smallest_ranks_leave(kind: str) -> None:
    """Exactly so many, in the order of a stable sort."""
    launcher, given = Launcher(lose_kernel, 80), ranks(kind)
    for count, losers in ((64, 1), (64, 24), (64, 63), (64, 64), (37, 1), (37, 20), (37, 37), (1, 1)):
        out = torch.empty(BLOCK, dtype=torch.int32)
        launcher[(1,)](out, torch.tensor(given), count, losers, BLOCK=BLOCK, num_warps=2)
        expected = set(sorted(range(count), key=given.__getitem__)[:losers])
        assert {index for index, lost in enumerate(out.tolist()) if lost} == expected, (count, losers)

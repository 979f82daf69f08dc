"""Heads so long that the CUDA kernels split them over blocks."""

from __future__ import annotations

import torch

from ssd_kernels import CachePlan, HeadSpec

from .cases import F32, PART, Case
from .pair import Pair

LONG = (HeadSpec.full(), HeadSpec.heavy(PART + 20, recent=2), HeadSpec.window(PART + 9), HeadSpec.heavy(3),
        HeadSpec.heavy(2 * PART, score="mean", pinned=(1,)))


def long_pair(dtype: torch.dtype = F32, *, case: Case, row_buffer: int = 0, keep_prompt: bool = True, group: int = 1,
              heads: tuple[HeadSpec, ...] = LONG, lengths: tuple[int, int] = (2 * PART + 40, PART - 1),
              head_dim: int = 32) -> Pair:
    """Prompts that fill more than one part, the second row's ending just before a part does."""
    plan = CachePlan([heads], row_buffer=row_buffer, keep_prompt=keep_prompt)
    pair = Pair(plan, case, group=group, head_dim=head_dim, max_prompt=max(lengths), steps=8, dtype=dtype,
                track_scores=True)
    pair.prefill(lengths)
    return pair

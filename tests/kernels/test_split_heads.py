"""Heads so long that the CUDA kernels split them over blocks; on a GPU too."""

from __future__ import annotations

import pytest
import torch

from ssd_kernels import CompressedCache, HeadSpec

from .cases import BF16, F16, F32, PART, Case, each_cuda
from .pair import bits, of_rows
from .split import LONG, long_pair


@each_cuda
@pytest.mark.parametrize("keep_prompt", [True, False], ids=["keep_prompt", "evict_prompt"])
@pytest.mark.parametrize(("dtype", "row_buffer", "group"), [(F32, 0, 1), (BF16, 3, 5), (F16, 3, 1)],
                         ids=["f32-R0", "bf16-R3-G5", "f16-R3"])
def test_heads_split_over_blocks(case: Case, dtype: torch.dtype, row_buffer: int, group: int,
                                 keep_prompt: bool) -> None:
    long_pair(dtype, case=case, row_buffer=row_buffer, keep_prompt=keep_prompt, group=group).run(4)


@each_cuda
def test_more_heads_than_lanes_and_some_split(case: Case) -> None:
    heads = tuple(HeadSpec.full() if index % 20 == 19 else HeadSpec.window(2) for index in range(41))
    pair = long_pair(case=case, heads=heads, keep_prompt=False, lengths=(PART + 1, 3))
    assert pair.cache._layers[0].native.parts > len(heads)
    pair.run(2)


@each_cuda
def test_split_heads_do_not_depend_on_their_batch(case: Case) -> None:
    both = long_pair(BF16, case=case)
    alone = CompressedCache(both.plan, batch_size=1, num_query_heads=len(LONG), head_dim=32,
                            max_prompt=both.max_prompt, num_visual_tokens=both.steps, dtype=BF16, track_scores=True,
                            device=case.device, backend=case.name)
    for ours, theirs in zip(of_rows(alone), of_rows(both.cache), strict=True):
        ours.copy_(theirs[:1])
    for _ in range(3):
        q, k, v = (both.draw(2, len(LONG), 32).to(case.device) for _ in range(3))
        together = both.cache.decode(0, q, k, v)
        assert torch.equal(together[:1], alone.decode(0, q[:1], k[:1], v[:1]))
    for mine, other in zip(of_rows(alone), of_rows(both.cache), strict=True):
        assert torch.equal(bits(mine[0]), bits(other[0]))

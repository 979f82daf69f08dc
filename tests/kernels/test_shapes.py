"""Shapes, storage types and memory layouts of the inputs; odd shapes first."""

from __future__ import annotations

import pytest
import torch

from .cases import BF16, Case, each_dtype, each_format, each_storage, mixed
from .pair import Pair, snapshot

# batch, KV heads, group, head_dim, row buffer
SHAPES = [(3, 5, 1, 40, 4), (5, 3, 3, 72, 0), (1, 7, 2, 96, 5), (7, 1, 5, 248, 0), (2, 4, 7, 104, 3),
          (2, 2, 1, 32, 0), (2, 2, 4, 64, 4), (2, 2, 1, 128, 4), (1, 2, 8, 256, 0)]


@each_storage
@pytest.mark.parametrize(("batch", "heads", "group", "head_dim", "row_buffer"), SHAPES,
                         ids=["B{}-H{}-G{}-D{}-R{}".format(*shape) for shape in SHAPES])
def test_shapes(case: Case, dtype: torch.dtype, batch: int, heads: int, group: int, head_dim: int,
                row_buffer: int) -> None:
    """"Tolerance": outputs, contents, kept sets and scores, for odd and for common shapes in every storage type."""
    pair = Pair(mixed(heads, row_buffer), case, batch=batch, group=group, head_dim=head_dim, max_prompt=7, steps=12,
                dtype=dtype)
    pair.prefill([(3 * row + 7) % 8 for row in range(batch)])
    pair.run(12)


@each_format
@pytest.mark.parametrize("group", [1, 2, 4, 8], ids="G{}".format)
@pytest.mark.parametrize("head_dim", [40, 128], ids="D{}".format)
def test_grouped_queries_share_the_kept_set(case: Case, head_dim: int, group: int) -> None:
    """"Query heads of one group (GQA) share C", and their probabilities are summed into one score."""
    pair = Pair(mixed(3, 3), case, group=group, head_dim=head_dim, steps=14, dtype=case.dtypes[1])
    pair.prefill([5, 1])
    pair.run(14)


@each_format
@pytest.mark.parametrize("batch", [1, 2, 5, 16, 33, 64], ids="B{}".format)
def test_batch_sizes(case: Case, batch: int) -> None:
    """Any number of rows, each with its own prompt length and kept set."""
    pair = Pair(mixed(3, 3), case, batch=batch, head_dim=32, steps=7)
    pair.prefill([row % 6 for row in range(batch)])
    pair.run(7)


@each_format
@pytest.mark.parametrize("head_dim", [40, 128], ids="D{}".format)
def test_longer_sequences(case: Case, head_dim: int) -> None:
    """Kept sets of a hundred slots and more: several blocks of any kernel, rings that wrap many times."""
    steps = 150
    pair = Pair(mixed(4, 24), case, batch=1, head_dim=head_dim, max_prompt=70, steps=steps, dtype=BF16)
    pair.prefill([67])
    pair.run(steps)


@each_storage
def test_strided_inputs(case: Case, dtype: torch.dtype) -> None:
    """q, k, v may be views with a unit stride in the last dimension: slices of a fused projection, transposes."""
    batch, heads, group, dim = 3, 4, 2, 40
    plain, strided = (Pair(mixed(heads, 3), case, batch=batch, group=group, head_dim=dim, dtype=dtype)
                      for _ in range(2))
    for pair in (plain, strided):
        pair.prefill([5, 2, 0])
    for _ in range(8):
        fused = plain.draw(batch, (group + 2) * heads, dim)
        q, k, v = fused.split([group * heads, heads, heads], 1)
        expected = plain.step(q.contiguous(), k.contiguous(), v.contiguous())
        transposed = v.transpose(0, 1).contiguous().transpose(0, 1)
        shifted = torch.cat([torch.zeros(1, dtype=dtype), k.flatten()])[1:].view(k.shape)  # not aligned to anything
        assert not q.is_contiguous() and not transposed.is_contiguous() and shifted.storage_offset() == 1
        assert torch.equal(strided.step(q, shifted, transposed), expected)


@each_storage
def test_broadcast_inputs(case: Case, dtype: torch.dtype) -> None:
    """Stride 0 over rows and heads: one query, key and value expanded to all."""
    pair = Pair(mixed(4), case, batch=3, dtype=dtype)
    pair.prefill([5, 2, 0])
    for _ in range(8):
        pair.step(*(pair.draw(1, 1, 40).expand(3, 4, 40) for _ in range(3)))


@each_storage
def test_prefill_takes_any_strides(case: Case, dtype: torch.dtype) -> None:
    """k and v as models make them, `[N, P, H, D]` transposed; scores strided too; rows and lengths as tensors."""
    pairs = [Pair(mixed(4, keep_prompt=False), case, batch=3, max_prompt=9, dtype=dtype) for _ in range(2)]
    k, v = pairs[0].draw(2, 9, 4, 40).to(case.device), pairs[0].draw(2, 18, 4, 40)[:, ::2].to(case.device)
    scores = torch.rand(2, 9, 4, generator=pairs[0].random).to(case.device)
    k, v, scores = k.transpose(1, 2), v.transpose(1, 2), scores.transpose(1, 2)
    assert not (k.is_contiguous() or v.is_contiguous() or scores.is_contiguous())
    pairs[0].cache.prefill(0, k, v, torch.tensor([9, 4]), scores=scores, rows=torch.tensor([2, 0]))
    pairs[1].cache.prefill(0, k.contiguous(), v.contiguous(), [9, 4], scores=scores.contiguous(), rows=[2, 0])
    for one, other in zip(*(snapshot(pair.cache) for pair in pairs), strict=True):
        assert torch.equal(one, other)
    assert len(pairs[0].cache.positions(0, 2)[2]) == 9


@each_dtype
def test_large_values_do_not_overflow(case: Case, dtype: torch.dtype) -> None:
    """Logits in the thousands: "accumulate in float32", with the usual shift by the maximum."""
    pair = Pair(mixed(3, 3), case, dtype=dtype, scale=1.0, steps=12)
    pair.prefill([5, 2])
    for _ in range(12):
        out = pair.cache.decode(0, *(pair.draw(2, 3, 40, factor=f).to(case.device) for f in (30.0, 30.0, 1.0)))
        assert out.isfinite().all()

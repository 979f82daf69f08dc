"""Where a head's tokens lie: columns of the head table, slots, and copies of whole vectors."""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = tl.constexpr(8)  # of the head table, as in ssd_kernels/layout.py
HEAVY = tl.constexpr(2)  # code of a kind, as there


@triton.jit
def head_columns(table, head):
    """A head's kind, first slot, capacity, keep, recent, rule and first scored slot: layout.LayerLayout.table."""
    at = table + head * COLUMNS
    return (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5),
            tl.load(at + 6))


@triton.jit
def slot_of(index, cut, skip):
    """Slot of the ``index``-th kept token, in the order of slots: ``skip`` slots are free from slot ``cut`` on."""
    return index + tl.where(index < cut, 0, skip)


@triton.jit
def origin_of(slot, own, prompt, apart):
    """What to count ``slot`` from, in keys or values: the first ``apart`` slots are a shared prompt's."""
    return tl.where(slot < apart, prompt, own)


@triton.jit
def scales_of(slot, key_scales, value_scales, prompt_key_scales, prompt_value_scales, apart, mask,
              SHARED: tl.constexpr):
    """Scales of the keys and of the values in slots, 0 where not ``mask``; ``apart``: of `origin_of`."""
    if SHARED:
        key_scales = origin_of(slot, key_scales, prompt_key_scales, apart)
        value_scales = origin_of(slot, value_scales, prompt_value_scales, apart)
    return tl.load(key_scales + slot, mask=mask, other=0.0), tl.load(value_scales + slot, mask=mask, other=0.0)


@triton.jit
def copy_vectors(k, v, source, keys, values, target, mask, D: tl.constexpr, D_PAD: tl.constexpr):
    """Keys and values of rows ``source`` [N] of k and v into rows ``target`` [N] of the slabs, where ``mask`` [N]."""
    dim = tl.arange(0, D_PAD)
    both = mask[:, None] & (dim < D)[None, :]
    source_at = source[:, None] * D + dim[None, :]  # [N, D_PAD]
    target_at = target[:, None] * D + dim[None, :]
    tl.store(keys + target_at, tl.load(k + source_at, mask=both), mask=both)
    tl.store(values + target_at, tl.load(v + source_at, mask=both), mask=both)

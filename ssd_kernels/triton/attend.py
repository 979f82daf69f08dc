"""Attention of a head's queries over its kept slots, read once.

Every part of a program, a warp or a row of lanes, attends to slots of its own and keeps a maximum, a sum and a vector
of its own, so that a block of slots needs no exchange between warps. Parts are combined once, at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import launch
from .int8 import LANES, words_as_numbers
from .slots import origin_of, scales_of, slot_of

LEAST_FLOAT = tl.constexpr(-3.4028234663852886e38)
PART_SLOTS = tl.constexpr(launch.PART_SLOTS)
INT8_PART_SLOTS = tl.constexpr(launch.INT8_PART_SLOTS)
PART_DIM = tl.constexpr(128)  # of the head dimension at most: a warp's registers hold no wider sums


@triton.jit
def product(x, y):
    """``x * y``, rounded by itself before it is summed over threads.

    A compiler that fuses a thread's own product with its neighbour's rounds differently in both, which then hold
    different copies of one sum.
    """
    return tl.fma(x, y, 0.0)


@triton.jit
def raised(highest, logit):
    """The new maximum, never -inf: logits of -inf then weigh 0 and not NaN, even where there are no others."""
    return tl.maximum(tl.maximum(highest, logit), LEAST_FLOAT)


@triton.jit
def attend_matrices(q, keys, values, prompt_keys, prompt_values, key_scales, value_scales, prompt_key_scales,
                    prompt_value_scales, apart, logits, total, cut, skip, unscored, scored_total, scale, scored_slots,
                    D: tl.constexpr, D_PAD: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
                    WARPS: tl.constexpr, STAGES: tl.constexpr, SCORED: tl.constexpr, SHARED: tl.constexpr,
                    INT8: tl.constexpr):
    """Attention of the queries [GROUP_PAD, D_PAD] of a group over ``total`` slots by products of 16-bit matrices.

    A batch of products is a warp's. Where D exceeds 128, neighbouring warps share their slots and halve the dimension.
    ``prompt_keys`` and the like, ``apart``: of `origin_of`. ``cut``, ``skip``: of `slot_of`. Logits are stored of the
    tokens from ``unscored`` up to ``scored_total``, which are all that have scores or none. Scales are read if INT8.

    Returns:
        maximum and sum [PARTS, GROUP_PAD] and output [PARTS, GROUP_PAD, D_PAD] of every part.
    """
    HALVES: tl.constexpr = (D_PAD + PART_DIM - 1) // PART_DIM
    DIM: tl.constexpr = D_PAD // HALVES
    PARTS: tl.constexpr = WARPS // HALVES
    # In 8 bits a weight's two roundings are rows of one product: releases of Triton differ in what they make of bytes
    # that are used twice. Rows beyond the group's repeat its queries.
    ROWS: tl.constexpr = 2 * GROUP_PAD if INT8 else GROUP_PAD
    member, warp = tl.arange(0, ROWS), tl.arange(0, WARPS)
    SLOTS: tl.constexpr = INT8_PART_SLOTS if INT8 and HALVES == 1 else PART_SLOTS
    WORD: tl.constexpr = 4 if INT8 else 1  # elements of a slab that are read as one
    WORDS: tl.constexpr = DIM // WORD
    word = (warp % HALVES * WORDS)[:, None, None] + tl.arange(0, WORDS)[None, None, :]  # [WARPS, 1, WORDS]
    own = (warp // HALVES * SLOTS)[:, None] + tl.arange(0, SLOTS)[None, :]  # [WARPS, SLOTS]
    stores = (warp % HALVES == 0)[:, None]
    if INT8:
        q = tl.reshape(tl.broadcast_to(q[None], [2, GROUP_PAD, D_PAD]), [ROWS, D_PAD])
    q = tl.permute(tl.reshape(q, [ROWS, HALVES, DIM]), (1, 0, 2))
    q = tl.reshape(tl.broadcast_to(q[None], [PARTS, HALVES, ROWS, DIM]), [WARPS, ROWS, DIM])
    if INT8:
        q = tl.permute(tl.reshape(q, [WARPS, ROWS, WORDS, 4]), (0, 1, 3, 2))  # as the keys' words are taken apart
        q = tl.reshape(q, [WARPS, ROWS, DIM])
        keys, values = keys.to(tl.pointer_type(tl.int32)), values.to(tl.pointer_type(tl.int32))
        if SHARED:
            prompt_keys = prompt_keys.to(tl.pointer_type(tl.int32))
            prompt_values = prompt_values.to(tl.pointer_type(tl.int32))
    highest = tl.full([WARPS, ROWS], LEAST_FLOAT, tl.float32)
    norm = tl.zeros([WARPS, ROWS], tl.float32)
    acc = tl.zeros([WARPS, ROWS, DIM], tl.float32)
    for start in tl.range(0, total, PARTS * SLOTS, num_stages=STAGES):
        index = start + own
        live = index < total
        slot = slot_of(index, cut, skip)
        where = slot[:, :, None] * (D // WORD) + word  # [WARPS, SLOTS, WORDS]
        mask = live[:, :, None] & (word < D // WORD)
        if SHARED:
            k_from = origin_of(slot, keys, prompt_keys, apart)[:, :, None]
            v_from = origin_of(slot, values, prompt_values, apart)[:, :, None]
        else:
            k_from, v_from = keys, values
        k = tl.load(k_from + where, mask=mask, other=0)
        v = tl.load(v_from + where, mask=mask, other=0)
        if INT8:
            key_scale, value_scale = scales_of(slot, key_scales, value_scales, prompt_key_scales, prompt_value_scales,
                                               apart, live, SHARED)
            # Exact in either type. float16 could not hold weights times the scales of small values.
            k, v = words_as_numbers(k, q.dtype, WORDS), words_as_numbers(v, tl.bfloat16, LANES)
        logit = tl.dot(q, tl.permute(k, (0, 2, 1)))  # [WARPS, ROWS, SLOTS]
        if HALVES > 1:
            both = tl.sum(tl.reshape(logit, [PARTS, HALVES, ROWS, SLOTS]), 1)
            logit = tl.broadcast_to(both[:, None], [PARTS, HALVES, ROWS, SLOTS])
            logit = tl.reshape(logit, [WARPS, ROWS, SLOTS])
        if INT8:
            logit *= key_scale[:, None, :]
        logit *= scale
        if SCORED:
            scored = (index >= unscored) & (index < scored_total) if SHARED else index < scored_total
            tl.store(logits + member[None, :, None] * scored_slots + slot[:, None, :], logit,
                     mask=(member < GROUP)[None, :, None] & (scored & stores)[:, None, :])
        logit = tl.where(live[:, None, :], logit, -float("inf"))
        new_highest = raised(highest, tl.max(logit, 2))
        weight = tl.exp2(logit - new_highest[:, :, None])
        fade = tl.exp2(highest - new_highest)
        norm = norm * fade + tl.sum(weight, 2)
        if INT8:
            weight *= value_scale[:, None, :]
        # One rounding to 16 bits would be an error of the weights as large as that of the whole result may be.
        high = weight.to(v.dtype)
        low = (weight - high.to(tl.float32)).to(v.dtype)
        acc *= fade[:, :, None]
        if INT8:
            acc = tl.dot(tl.where((member < GROUP_PAD)[None, :, None], high, low), v, acc)
        else:
            acc = tl.dot(low, v, tl.dot(high, v, acc))
        highest = new_highest
    if INT8:
        highest = tl.max(tl.reshape(highest, [WARPS, 2, GROUP_PAD]), 1)
        norm = tl.max(tl.reshape(norm, [WARPS, 2, GROUP_PAD]), 1)
        acc = tl.sum(tl.reshape(acc, [WARPS, 2, GROUP_PAD, DIM]), 1)
        acc = tl.permute(tl.reshape(acc, [WARPS, GROUP_PAD, 4, WORDS // LANES, LANES]), (0, 1, 4, 3, 2))
        acc = tl.reshape(acc, [WARPS, GROUP_PAD, DIM])
    if HALVES > 1:
        highest = tl.max(tl.reshape(highest, [PARTS, HALVES, GROUP_PAD]), 1)
        norm = tl.max(tl.reshape(norm, [PARTS, HALVES, GROUP_PAD]), 1)
        acc = tl.permute(tl.reshape(acc, [PARTS, HALVES, GROUP_PAD, DIM]), (0, 2, 1, 3))
        acc = tl.reshape(acc, [PARTS, GROUP_PAD, D_PAD])
    return highest, norm, acc


@triton.jit
def attend_lanes(q, keys, values, prompt_keys, prompt_values, key_scales, value_scales, prompt_key_scales,
                 prompt_value_scales, apart, logits, total, cut, skip, unscored, scored_total, scale, scored_slots,
                 D: tl.constexpr, D_PAD: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
                 BLOCK: tl.constexpr, STAGES: tl.constexpr, SCORED: tl.constexpr, SHARED: tl.constexpr,
                 INT8: tl.constexpr):
    """`attend_matrices` by multiply-adds, for float32; a part is every ``BLOCK``-th slot."""
    member, part = tl.arange(0, GROUP_PAD), tl.arange(0, BLOCK)
    dim = tl.arange(0, D_PAD)[None, None, :]
    q = q[None].to(tl.float32)  # [1, GROUP_PAD, D_PAD]
    highest = tl.full([BLOCK, GROUP_PAD], LEAST_FLOAT, tl.float32)
    norm = tl.zeros([BLOCK, GROUP_PAD], tl.float32)
    acc = tl.zeros([BLOCK, GROUP_PAD, D_PAD], tl.float32)
    for start in tl.range(0, total, BLOCK, num_stages=STAGES):
        index = start + part
        live = index < total
        slot = slot_of(index, cut, skip)
        where = slot[:, None, None] * D + dim  # [BLOCK, 1, D_PAD]
        mask = live[:, None, None] & (dim < D)
        if SHARED:
            k_from = origin_of(slot, keys, prompt_keys, apart)[:, None, None]
            v_from = origin_of(slot, values, prompt_values, apart)[:, None, None]
        else:
            k_from, v_from = keys, values
        k = tl.load(k_from + where, mask=mask, other=0).to(tl.float32)
        v = tl.load(v_from + where, mask=mask, other=0).to(tl.float32)
        logit = tl.sum(k * q, 2)  # [BLOCK, GROUP_PAD]
        if INT8:
            key_scale, value_scale = scales_of(slot, key_scales, value_scales, prompt_key_scales, prompt_value_scales,
                                               apart, live, SHARED)
            logit *= key_scale[:, None]
        logit *= scale
        if SCORED:
            scored = (index >= unscored) & (index < scored_total) if SHARED else index < scored_total
            tl.store(logits + member[None, :] * scored_slots + slot[:, None], logit,
                     mask=(member < GROUP)[None, :] & scored[:, None])
        logit = tl.where(live[:, None], logit, -float("inf"))
        new_highest = raised(highest, logit)
        weight = tl.exp2(logit - new_highest)
        fade = tl.exp2(highest - new_highest)
        norm = norm * fade + weight
        if INT8:
            weight *= value_scale[:, None]
        acc = acc * fade[:, :, None] + weight[:, :, None] * v
        highest = new_highest
    return highest, norm, acc


@triton.jit
def combined(highest, norm, acc, new_logit, new_value):
    """All parts and the new token: maximum and sum [GROUP_PAD], output [GROUP_PAD, D_PAD], not divided by the sum."""
    top = raised(new_logit, tl.max(highest, 0))
    share = tl.exp2(highest - top[None, :])
    own = tl.exp2(new_logit - top)
    norm = tl.sum(product(norm, share), 0) + own
    return top, norm, tl.sum(product(acc, share[:, :, None]), 0) + product(own[:, None], new_value[None, :])

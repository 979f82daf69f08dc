"""One token per picture in one launch: ssd_kernels/filters.py says what is computed, and in which operations."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import filters
from .noise import exponential

LOG2_E, LN_2_HIGH = tl.constexpr(filters.LOG2_E), tl.constexpr(filters.LN_2_HIGH)
LN_2_LOW, LOWEST = tl.constexpr(filters.LN_2_LOW), tl.constexpr(filters.LOWEST)
EXP_TERMS = tl.constexpr(filters.EXP_TERMS)
UNIT = tl.constexpr(2.0**filters.MASS_BITS)


@triton.jit
def exp(x):
    """The same operations as `ssd_kernels.filters.exp`."""
    inside = tl.maximum(x, LOWEST)
    exponent = (inside * LOG2_E - 0.5).to(tl.int32)
    whole = exponent.to(tl.float32)
    rest = (inside - whole * LN_2_HIGH) - whole * LN_2_LOW
    series = tl.full(x.shape, EXP_TERMS[0], tl.float32)
    for term in tl.static_range(1, len(EXP_TERMS)):
        series = series * rest + EXP_TERMS[term]
    return tl.where(x < LOWEST, 0.0, series * ((exponent + 127) << 23).to(tl.float32, bitcast=True))


@triton.jit
def ordered(x):
    """uint32 in the order of float32 x."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["seed_stride", "step_stride", "pictures", "guided", "top_k", "share"])
def sample_kernel(tokens, row_logits, scale, seeds, seed_stride, steps, step_stride, pictures, guided, codes,
                  temperature, top_k, share, TOP_K: tl.constexpr, TOP_P: tl.constexpr, BLOCK: tl.constexpr):
    """One picture. ``row_logits`` float32 [pictures + guided, codes]; ``share``: `filters.tail_share`. ``BLOCK``: a
    power of two, at least ``codes``; a thread holds its share of all codes in registers.

    Thresholds are found bit by bit from the highest, by counts and sums that do not depend on the order of codes.
    """
    picture = tl.program_id(0).to(tl.int64)
    code = tl.arange(0, BLOCK)
    inside = code < codes
    logit = tl.load(row_logits + picture * codes + code, mask=inside, other=-float("inf"))
    if picture < guided:
        plain = tl.load(row_logits + (pictures + picture) * codes + code, mask=inside, other=0.0)
        logit = tl.where(inside, plain + (logit - plain) * tl.load(scale + picture), logit)
    logit = tl.div_rn(logit, tl.full(logit.shape, temperature, tl.float32))
    key = ordered(logit)
    kept = inside
    if TOP_K:
        lowest = tl.full((), 0, tl.uint32)  # the largest key that at least top_k keys reach
        for index in range(32):
            candidate = lowest | (tl.full((), 1, tl.uint32) << (31 - index).to(tl.uint32))
            reach = tl.sum((inside & (key >= candidate)).to(tl.int32), 0)
            lowest = tl.where(reach >= top_k, candidate, lowest)
        kept = kept & (key >= lowest)
    weight = tl.where(kept, exp(logit - tl.max(logit, 0)), 0.0)
    if TOP_P:
        mass = (weight * UNIT + 0.5).to(tl.int32)
        total = tl.sum(mass.to(tl.int64), 0)
        wide = tl.full((), 0, tl.int64) + share
        limit = ((total >> 22) * wide + (((total & 0x3FFFFF) * wide) >> 22)) >> 8
        border = tl.full((), 0, tl.uint32)  # the largest key below which there is no more than the limit
        for index in range(32):
            candidate = border | (tl.full((), 1, tl.uint32) << (31 - index).to(tl.uint32))
            below = tl.sum(tl.where(key < candidate, mass, 0).to(tl.int64), 0)
            border = tl.where(below <= limit, candidate, border)
        below = tl.sum(tl.where(key < border, mass, 0).to(tl.int64), 0)
        equal = (key == border) & kept
        # Equal ones have equal masses; the first of them go, as many as the limit has room for.
        each = tl.max(tl.where(equal, mass, 0), 0).to(tl.int64)
        leaving = ((limit - below) // tl.maximum(each, 1)).to(tl.int32)
        kept = kept & ((key > border) | (equal & (tl.cumsum(equal.to(tl.int32), 0) > leaving)))
    noise = exponential(tl.load(seeds + picture * seed_stride), tl.load(steps + picture * step_stride),
                        tl.arange(0, BLOCK // 4), BLOCK // 4)
    race = tl.where(kept, tl.div_rn(weight, noise), -1.0)
    winner = tl.min(tl.where(race == tl.max(race, 0), code, BLOCK), 0)
    tl.store(tokens + picture, tl.where(winner < codes, winner, 0).to(tl.int64))  # no winner: nothing but NaN

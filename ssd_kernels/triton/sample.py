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


@triton.jit
def warm_logits(row_logits, scale, picture, pictures, guided, codes, temperature, code):
    """Logits of codes, guided and divided by the temperature; -inf beyond the last."""
    inside = code < codes
    logit = tl.load(row_logits + picture * codes + code, mask=inside, other=-float("inf"))
    if picture < guided:
        factor = tl.load(scale + picture)
        plain = tl.load(row_logits + (pictures + picture) * codes + code, mask=inside, other=0.0)
        logit = tl.where(inside & (factor > 1.0), plain + (logit - plain) * factor, logit)
    return tl.div_rn(logit, tl.full(logit.shape, temperature, tl.float32))


@triton.jit
def thresholds(logit, inside, top_k, share, EACH: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr):
    """What keeps a code: the largest logit; the smallest key for top-k; the smallest for top-p, and how many codes of
    just that key, the first ones, go all the same.

    Keys are found bit by bit from the highest, by counts and sums that do not depend on the order of codes.
    """
    top = tl.max(logit, 0)
    lowest = tl.full((), 0, tl.uint32)  # the largest key that at least top_k keys reach
    border = tl.full((), 0, tl.uint32)  # the largest key below which there is no more mass than the limit
    leaving = tl.full((), 0, tl.int32)
    one = tl.full((), 1, tl.uint32)
    key = ordered(logit)
    if TOP_K:
        for index in range(tl.where(top_k > 0, 32, 0) if EACH else 32):
            candidate = lowest | (one << (31 - index).to(tl.uint32))
            reach = tl.sum((inside & (key >= candidate)).to(tl.int32), 0)
            lowest = tl.where(reach >= top_k, candidate, lowest)
    if TOP_P:
        kept = inside & (key >= lowest)
        mass = (tl.where(kept, exp(logit - top), 0.0) * UNIT + 0.5).to(tl.int32)
        total = tl.sum(mass.to(tl.int64), 0)
        wide = tl.full((), 0, tl.int64) + share
        limit = ((total >> 22) * wide + (((total & 0x3FFFFF) * wide) >> 22)) >> 8
        for index in range(tl.where(share > 0, 32, 0) if EACH else 32):
            candidate = border | (one << (31 - index).to(tl.uint32))
            below = tl.sum(tl.where(key < candidate, mass, 0).to(tl.int64), 0)
            border = tl.where(below <= limit, candidate, border)
        below = tl.sum(tl.where(key < border, mass, 0).to(tl.int64), 0)
        each = tl.max(tl.where((key == border) & kept, mass, 0), 0).to(tl.int64)
        leaving = ((limit - below) // tl.maximum(each, 1)).to(tl.int32)
    return top, lowest, border, leaving


@triton.jit(do_not_specialize=["seed_stride", "step_stride", "pictures", "guided", "top_k", "share"])
def sample_kernel(tokens, row_logits, scale, seeds, seed_stride, steps, step_stride, pictures, guided, codes,
                  temperature, top_k, share, EACH: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr,
                  BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """One picture. ``row_logits`` float32 [pictures + guided, codes]; ``share``: `filters.tail_share`. If EACH, these
    numbers are tensors with one of every picture, `filters.PerPicture`. ``BLOCK``: a power of two, at least ``codes``;
    ``CHUNK``: codes that get noise at once.

    For `thresholds` the threads hold all codes in registers. Then these are read again, in chunks, and drawn from.
    """
    picture = tl.program_id(0).to(tl.int64)
    greedy = False
    if EACH:
        temperature, top_k = tl.load(temperature + picture), tl.load(top_k + picture)
        share = tl.load(share + picture)
        greedy = temperature == 0.0
        temperature = tl.where(greedy, 1.0, temperature)
        top_k, share = tl.where(greedy, 1, top_k), tl.where(greedy, 0, share)
    all_codes = tl.arange(0, BLOCK)
    all_logits = warm_logits(row_logits, scale, picture, pictures, guided, codes, temperature, all_codes)
    top, lowest, border, leaving = thresholds(all_logits, all_codes < codes, top_k, share, EACH, TOP_K, TOP_P)
    seed, step = tl.load(seeds + picture * seed_stride), tl.load(steps + picture * step_stride)
    best = tl.full((), -1.0, tl.float32)
    winner = tl.full((), 0, tl.int32)
    equals = tl.full((), 0, tl.int32)
    for first in range(0, codes, CHUNK):
        code = first + tl.arange(0, CHUNK)
        logit = warm_logits(row_logits, scale, picture, pictures, guided, codes, temperature, code)
        key = ordered(logit)
        kept = (code < codes) & (key >= lowest)
        if TOP_P:
            equal = kept & (key == border)
            kept = kept & ((key > border) | (equal & (equals + tl.cumsum(equal.to(tl.int32), 0) > leaving)))
            equals += tl.sum(equal.to(tl.int32), 0)
        noise = exponential(seed, step, first // 4 + tl.arange(0, CHUNK // 4), CHUNK // 4)
        if EACH:
            noise = tl.where(greedy, 1.0, noise)
        race = tl.where(kept, tl.div_rn(exp(logit - top), noise), -1.0)
        fastest = tl.max(race, 0)
        winner = tl.where(fastest > best, tl.min(tl.where(race == fastest, code, BLOCK), 0), winner)
        best = tl.where(fastest > best, fastest, best)
    tl.store(tokens + picture, winner.to(tl.int64))

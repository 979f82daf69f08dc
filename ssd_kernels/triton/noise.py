"""Exponential noise in one launch: ssd_kernels/philox.py says what is computed, and in which operations."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import philox

LN_2, SQRT_2 = tl.constexpr(philox.LN_2), tl.constexpr(philox.SQRT_2)
ATANH_TERMS = tl.constexpr(philox.ATANH_TERMS)


@triton.jit
def exponential_of(word):
    """-ln((word + 1/2) / 2^32) of uint32 words; the same operations as `ssd_kernels.philox.exponential_of`."""
    near_one = word >= 0x80000000
    y = (tl.where(near_one, 0xFFFFFFFF - word, word).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    bits = y.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    large = mantissa > SQRT_2
    exponent += large.to(tl.int32)
    mantissa = tl.where(large, mantissa * 0.5, mantissa)
    f = tl.where(near_one, -y, mantissa - 1.0)
    s = tl.div_rn(f, f + 2.0)
    z = s * s
    series = tl.full(z.shape, ATANH_TERMS[0], tl.float32)
    for term in tl.static_range(1, len(ATANH_TERMS)):
        series = series * z + ATANH_TERMS[term]
    tail = tl.where(near_one, 0.0, exponent.to(tl.float32) * -LN_2)
    return tail - (s * 2.0) * series


@triton.jit
def exponential(seed, step, group, GROUPS: tl.constexpr):
    """The numbers of the four codes of every group, float32 [4 GROUPS].

    ``seed``, ``step``: int64. ``group``: int32 [GROUPS], code // 4, consecutive.
    """
    low = (step & 0xFFFFFFFF).to(tl.uint32)
    high = ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    group = group.to(tl.uint32)
    zero = group & 0
    a, b, c, d = tl.philox(seed, group, zero + low, zero + high, zero)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [GROUPS, 2, 2]
    return exponential_of(tl.reshape(words, [4 * GROUPS]))


@triton.jit(do_not_specialize=["seed_stride", "step_stride"])
def noise_kernel(out, seeds, seed_stride, steps, step_stride, codes, GROUPS: tl.constexpr):
    """One block of ``4 GROUPS`` codes of one picture: ``out`` float32 [pictures, codes], contiguous."""
    picture = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * GROUPS
    values = exponential(tl.load(seeds + picture * seed_stride), tl.load(steps + picture * step_stride),
                         first + tl.arange(0, GROUPS), GROUPS)
    code = 4 * first + tl.arange(0, 4 * GROUPS)
    tl.store(out + picture * codes + code, values, mask=code < codes)

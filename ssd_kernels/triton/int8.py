"""Vectors in 8 bits: ssd_kernels/kv_format.py says what is computed, and in which operations."""

from __future__ import annotations

import triton
import triton.language as tl

from .. import kv_format
from .attend import product

LARGEST = tl.constexpr(kv_format.LARGEST)
SMALLEST_AMAX = tl.constexpr(kv_format.SMALLEST_AMAX)
INFINITY = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all of a float's bits but the sign
# Added to a number below 2^22, it leaves that rounded to an integer, half to even, in the sum's lowest bits.
ROUNDING = tl.constexpr(1.5 * 2.0**23)
ROUNDING_BITS = tl.constexpr(0x4B400000)


@triton.jit
def magnitude(x):
    """Bits of |x|, int32, in the order of |x|: infinity and NaN above all others."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def quantised(x, highest):
    """Bytes of vectors ``x`` and their scales, of the shape of ``highest``, which is the highest `magnitude` of each."""
    amax = highest.to(tl.float32, bitcast=True)
    usable = (highest < INFINITY) & (amax >= SMALLEST_AMAX)
    amax = tl.where(usable, amax, 1.0)
    largest = tl.full(amax.shape, LARGEST, tl.float32)
    scale = tl.where(usable, tl.div_rn(amax, largest), tl.where(highest < INFINITY, 0.0, float("nan")))
    scaled = product(x.to(tl.float32), tl.div_rn(largest, amax))
    whole = (scaled + ROUNDING).to(tl.int32, bitcast=True) - ROUNDING_BITS
    whole = tl.minimum(tl.maximum(whole, -LARGEST), LARGEST)
    return tl.where(usable, whole, 0).to(tl.int8), scale


@triton.jit
def store_quantised(x, source, slab, scales, target, mask, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows ``source`` [N] of x into rows ``target`` [N] of a slab and its scales, where ``mask`` [N]."""
    dim = tl.arange(0, D_PAD)
    both = mask[:, None] & (dim < D)[None, :]
    vector = tl.load(x + source[:, None] * D + dim[None, :], mask=both, other=0.0)  # [N, D_PAD]
    data, scale = quantised(vector, tl.max(magnitude(vector), 1, keep_dims=True))
    tl.store(slab + target[:, None] * D + dim[None, :], data, mask=both)
    tl.store(scales + target[:, None], scale, mask=mask[:, None])

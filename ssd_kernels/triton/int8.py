"""Vectors in 8 bits: ssd_kernels/kv_format.py says what is computed, and in which operations."""

from __future__ import annotations

import triton
import triton.language as tl

from ..kv_format import LARGEST as LARGEST_BYTE
from ..kv_format import SMALLEST_AMAX as SMALLEST_STORED

LARGEST = tl.constexpr(LARGEST_BYTE)
SMALLEST_AMAX = tl.constexpr(SMALLEST_STORED)
INFINITY = tl.constexpr(0x7F800000)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)  # all of a float's bits but the sign
# Added to a number below 2^22, it leaves that rounded to an integer, half to even, in the sum's lowest bits.
ROUNDING = tl.constexpr(1.5 * 2.0**23)
ROUNDING_BITS = tl.constexpr(0x4B400000)
LANES = tl.constexpr(8)  # of a warp that a column of a product's second matrix each has


def _bfloat16_pair(at: int) -> str:
    """Bytes ``at`` of two words as bfloat16: 128 + the low 7 bits, which it holds exactly, less 128 or 256 by sign."""
    return f"""{{
        .reg .b32 low, high, one;
        mov.b32 one, 0x3F803F80;
        prmt.b32 low, $1, $2, {0x4400 + 0x1111 * at:#x};
        lop3.b32 high, low, 0x00800080, 0xC300C300, 0xEA;
        lop3.b32 low, low, 0x007F007F, 0x43004300, 0xEA;
        fma.rn.bf16x2 $0, low, one, high;
    }}"""


def _float16_pair(at: int) -> str:
    """Bytes ``at`` of two words as float16: 1024 + 128 + byte, of which it holds every bit, less 1152."""
    return f"""{{
        .reg .b32 both, one, less;
        mov.b32 one, 0x3C003C00;
        mov.b32 less, 0xE480E480;
        prmt.b32 both, $1, $2, {0x4400 + 0x1111 * at:#x};
        lop3.b32 both, both, 0x00FF00FF, 0x64806480, 0x6A;
        fma.rn.f16x2 $0, both, one, less;
    }}"""


BFLOAT16_PAIRS = tl.constexpr(tuple(_bfloat16_pair(at) for at in range(4)))
FLOAT16_PAIRS = tl.constexpr(tuple(_float16_pair(at) for at in range(4)))


@triton.jit
def magnitude(x):
    """Bits of |x|, int32, in the order of |x|: infinity and NaN above all others."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def quantised(x, highest):
    """Bytes of vectors ``x`` and their scales; ``highest``: of each the highest `magnitude`, of the scales' shape."""
    amax = highest.to(tl.float32, bitcast=True)
    usable = (highest < INFINITY) & (amax >= SMALLEST_AMAX)
    amax = tl.where(usable, amax, 1.0)
    largest = tl.full(amax.shape, LARGEST, tl.float32)
    scale = tl.where(usable, tl.div_rn(amax, largest), tl.where(highest < INFINITY, 0.0, float("nan")))
    scaled = tl.fma(x.to(tl.float32), tl.div_rn(largest, amax), 0.0)  # rounded, and not fused with the next sum
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


@triton.jit
def byte_of(words, dtype: tl.constexpr, AT: tl.constexpr):
    """The ``AT``-th signed bytes of int32 words, as bfloat16 or float16."""
    if dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(BFLOAT16_PAIRS[AT], "=r,r,r", [words], tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise(FLOAT16_PAIRS[AT], "=r,r,r", [words], tl.float16, True, 2)


@triton.jit
def words_as_numbers(words, dtype: tl.constexpr, RUNS: tl.constexpr):
    """The signed bytes of int32 words [L, M, N] as numbers [L, M, 4 N] of a 16-bit type, in the order that costs least.

    That is by their place in the word, then by the word's place in one of RUNS equal runs of words, then by run. In
    products over M with ``RUNS=LANES``, and over 4 N with ``RUNS=N``, no thread needs a byte of a word that it does not
    read whole, and consecutive words of it too.
    """
    L: tl.constexpr = words.shape[0]
    M: tl.constexpr = words.shape[1]
    N: tl.constexpr = words.shape[2]
    even = tl.join(byte_of(words, dtype, 0), byte_of(words, dtype, 2))
    odd = tl.join(byte_of(words, dtype, 1), byte_of(words, dtype, 3))
    every = tl.reshape(tl.join(even, odd), [L, M, RUNS, N // RUNS, 4])
    return tl.reshape(tl.permute(every, (0, 1, 4, 3, 2)), [L, M, 4 * N])

"""Random numbers that are a function of their seed, their step and their code only, in torch.

Counter based (Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Integers and IEEE
float32 without fused or approximate operations: every device computes the same bits. ssd_kernels/triton/noise.py does
the same in a kernel.
"""

from __future__ import annotations

import torch

__all__ = ["exponential", "exponential_of", "philox"]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
ROUNDS = 10
LN_2, SQRT_2 = 0.6931471805599453, 1.4142135623730951
ATANH_TERMS = tuple(1 / odd for odd in range(15, 0, -2))  # of s^14 .. s^0 in atanh(s) / s; the next is below 2^-29


def philox(counters: tuple[torch.Tensor, ...], keys: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Four words of 32 random bits for every counter.

    Args:
        counters: four, keys: two int64 tensors of words within 0 .. 2^32 - 1, which broadcast.

    Returns:
        four int64 tensors of such words.
    """
    a, b, c, d = counters
    first, second = keys
    for _ in range(ROUNDS):
        # The product wraps around, so that its bits are right and only its sign may be wrong.
        low, high = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = ((high >> 32) & WORD) ^ b ^ first, high & WORD, ((low >> 32) & WORD) ^ d ^ second, low & WORD
        first, second = (first + KEY_STEPS[0]) & WORD, (second + KEY_STEPS[1]) & WORD
    return a, b, c, d


def exponential_of(words: torch.Tensor) -> torch.Tensor:
    """-ln((w + 1/2) / 2^32) of int64 words w: float32, positive, finite and exact to a few units in the last place.

    Near 1 the logarithm is taken of the distance to 1, which the word has in full: small numbers, which decide what is
    sampled, are as fine as large ones.
    """
    near_one = words >= 1 << 31
    y = (torch.where(near_one, WORD - words, words).float() + 0.5) * 2.0**-32  # of 1 or of 0 the distance, up to 1/2
    bits = y.view(torch.int32)
    exponent, mantissa = (bits >> 23) - 127, ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    large = mantissa > SQRT_2
    exponent, mantissa = exponent + large.int(), torch.where(large, mantissa * 0.5, mantissa)
    f = torch.where(near_one, -y, mantissa - 1.0)  # ln(1 + f) + exponent ln 2 = 2 atanh(f / (2 + f)) + ...
    s = f / (f + 2.0)
    z, series = s * s, torch.full_like(s, ATANH_TERMS[0])
    for term in ATANH_TERMS[1:]:
        series = series * z + term
    tail = torch.where(near_one, torch.zeros_like(y), exponent.float() * -LN_2)
    return tail - (s * 2.0) * series


def exponential(seeds: torch.Tensor, steps: torch.Tensor, codes: int) -> torch.Tensor:
    """Independent numbers of the exponential distribution with mean 1.

    Args:
        seeds, steps: int64 ``[pictures]``.
        codes: numbers per picture.

    Returns:
        float32 ``[pictures, codes]`` on the device of ``seeds``: in row i code c the word c % 4 of Philox with the key
        ``seeds[i]`` and the counter (c // 4, ``steps[i]``, 0), words of 64 bits with the low half first.
    """
    group = torch.arange(-(-codes // 4), device=seeds.device)
    seed, step = seeds[:, None], steps[:, None]
    keys = (seed & WORD, (seed >> 32) & WORD)
    words = philox((group, step & WORD, (step >> 32) & WORD, torch.zeros_like(step)), keys)
    return exponential_of(torch.stack(words, -1).flatten(1)[:, :codes])

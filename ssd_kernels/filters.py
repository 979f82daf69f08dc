"""From logits of guided and plain pictures to tokens: guidance, temperature, top-k, top-p and a draw, in torch.

Every step has one definition here, in integers and IEEE float32 without fused or approximate operations, so that every
device draws the same token from the same logits; ssd_kernels/triton/sample.py does the same in a kernel. Masses are
integers, whose sums do not depend on their order.
"""

from __future__ import annotations

from typing import Any

import torch

from . import philox

__all__ = ["guided", "sample", "warped"]

LOG2_E = 1.4426950408889634
LN_2_HIGH, LN_2_LOW = 0.693359375, -2.12194440e-4  # the high part times an exponent is exact
EXP_TERMS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
LOWEST = -80.0  # exponentials of less are 0
MASS_BITS = 30  # of the likeliest code


def exp(x: torch.Tensor) -> torch.Tensor:
    """e^x of float32 x up to 0, exact to a few units in the last place; 0 below `LOWEST`."""
    inside = x.clamp(min=LOWEST)
    exponent = (inside * LOG2_E - 0.5).int()
    whole = exponent.float()
    rest = (inside - whole * LN_2_HIGH) - whole * LN_2_LOW
    series = torch.full_like(rest, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        series = series * rest + term
    return torch.where(x < LOWEST, 0.0, series * ((exponent + 127) << 23).view(torch.float32))


def ordered(x: torch.Tensor) -> torch.Tensor:
    """int64 within 0 .. 2^32 - 1 in the order of float32 x."""
    bits = (x + 0.0).view(torch.int32).long()  # of both zeros the positive one
    return torch.where(bits < 0, bits.bitwise_not(), bits + 2**31)


def warped(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which codes may be drawn, and how likely: transformers' temperature, top-k and top-p, in this order.

    Of codes with equal logits, top-k keeps all that equal the last one kept. top-p removes the least likely codes whose
    mass, theirs included, is at most 1 - ``top_p`` of the whole; of equally likely ones those of lower numbers first,
    which transformers leaves to torch's sort.

    Args:
        logits: float32 ``[pictures, codes]``, guided.

    Returns:
        bool ``[pictures, codes]``, and float32 weights with 1 for the likeliest, 0 where removed.
    """
    # On the device: torch multiplies by the reciprocal of a number that a GPU gets from the host.
    logits = logits / torch.full((), temperature, dtype=torch.float32, device=logits.device)
    keys, codes = ordered(logits), logits.shape[1]
    kept = torch.ones_like(keys, dtype=torch.bool)
    if 0 < top_k < codes:
        kept = keys >= keys.topk(top_k).values[:, -1:]
    weights = torch.where(kept, exp(logits - logits.max(1, keepdim=True).values), 0.0)
    if top_p < 1:
        masses = (weights * 2.0**MASS_BITS + 0.5).int().long()
        order = keys.sort(dim=1, stable=True).indices
        limit = tail(masses.sum(1, keepdim=True), tail_share(top_p))
        stays = masses.gather(1, order).cumsum(1) > limit
        kept = kept & torch.empty_like(kept).scatter_(1, order, stays)
        weights = torch.where(kept, weights, 0.0)
    return kept, weights


def tail_share(top_p: float) -> int:
    """What top-p may remove, in units of 2^-30: never all of them, so that the likeliest code stays."""
    return min(round((1 - top_p) * 2**30), 2**30 - 1)


def tail(total: Any, share: Any) -> Any:
    """floor(total * share / 2^30) without overflow, for a total below 2^46."""
    return ((total >> 22) * share + (((total & 0x3FFFFF) * share) >> 22)) >> 8


def guided(logits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Logits ``[pictures, codes]`` of rows ``[pictures + guided, codes]``: of all pictures, then the unconditional ones
    of those with guidance, which come first; ``scale`` float32 ``[guided]``."""
    count = len(scale)
    conditional, unconditional = logits[:len(logits) - count], logits[len(logits) - count:]
    first = unconditional + (conditional[:count] - unconditional) * scale[:, None]
    return first if len(conditional) == count else torch.cat([first, conditional[count:]])


def sample(logits: torch.Tensor, scale: torch.Tensor, seeds: torch.Tensor, steps: torch.Tensor,
           temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    """Tokens by the exponential race: the largest of weight / `philox.exponential`, of equals the first.

    The numbers are what `noise.exponential_` fills a buffer with, so that both ways draw the same but for rounding.

    Args:
        logits: float32 ``[pictures + guided, codes]``, ``scale``: float32 ``[guided]``, as `guided` takes them.
        seeds, steps: int64 ``[pictures]``.
        temperature: above 0. top_k, top_p: restrict; 0 and 1 do not.

    Returns:
        int64 ``[pictures]``.
    """
    kept, weights = warped(guided(logits, scale), temperature, top_k, top_p)
    race = torch.where(kept, weights / philox.exponential(seeds, steps, logits.shape[1]), -1.0)
    return (race == race.max(1, keepdim=True).values).int().argmax(1)

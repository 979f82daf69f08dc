"""From logits of guided and plain pictures to tokens: guidance, temperature, top-k, top-p and a draw, in torch.

Every step has one definition here, in integers and IEEE float32 without fused or approximate operations, so that every
device draws the same token from the same logits; ssd_kernels/triton/sample.py does the same in a kernel. Masses are
integers, whose sums do not depend on their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import philox

__all__ = ["PerPicture", "guided", "sample", "warped"]

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


class PerPicture(NamedTuple):
    """What restricts the draw of every picture, on the device, where a captured step reads it.

    Attributes:
        temperature: float32 ``[pictures]``; 0 takes the likeliest code, of equals the first, whatever else is said.
        top_k: int32 ``[pictures]``; 0: all codes.
        tail: int32 ``[pictures]``, the `tail_share` of top-p.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    tail: torch.Tensor

    @classmethod
    def of(cls, numbers: Sequence[tuple[float, int, float]], device: torch.device) -> PerPicture:
        """Of (temperature, top_k, top_p) of every picture."""
        temperature, top_k, top_p = zip(*numbers, strict=True) if numbers else ((), (), ())
        return cls(torch.tensor(temperature, dtype=torch.float32, device=device),
                   torch.tensor(top_k, dtype=torch.int32, device=device),
                   torch.tensor([tail_share(share) for share in top_p], dtype=torch.int32, device=device))

    @classmethod
    def same(cls, pictures: int, temperature: float, top_k: int, top_p: float, device: torch.device) -> PerPicture:
        """The same of all, filled in on the device."""
        return cls(torch.full((pictures,), temperature, dtype=torch.float32, device=device),
                   torch.full((pictures,), top_k, dtype=torch.int32, device=device),
                   torch.full((pictures,), tail_share(top_p), dtype=torch.int32, device=device))


def warped(logits: torch.Tensor, each: PerPicture) -> tuple[torch.Tensor, torch.Tensor]:
    """Which codes may be drawn, and how likely: transformers' temperature, top-k and top-p, in this order.

    Of codes with equal logits, top-k keeps all that equal the last one kept. top-p removes the least likely codes whose
    mass, theirs included, is at most 1 - top-p of the whole; of equally likely ones those of lower numbers first, which
    transformers leaves to torch's sort. With a temperature of 0 those equal to the largest are kept.

    Args:
        logits: float32 ``[pictures, codes]``, guided.
        each: of the pictures.

    Returns:
        bool ``[pictures, codes]``, and float32 weights with 1 for the likeliest, 0 where removed.
    """
    greedy, codes = (each.temperature == 0)[:, None], logits.shape[1]
    # By a tensor: torch multiplies by the reciprocal of a number that a GPU gets from the host.
    logits = logits / torch.where(greedy, 1.0, each.temperature[:, None])
    keys = ordered(logits)
    order = keys.sort(dim=1, stable=True).indices
    top_k = torch.where(greedy, 1, each.top_k[:, None]).long()
    last = keys.gather(1, order).gather(1, (codes - top_k).clamp(0, codes - 1))
    kept = (keys >= last) | (top_k == 0)
    weights = torch.where(kept, exp(logits - logits.max(1, keepdim=True).values), 0.0)
    masses = (weights * 2.0**MASS_BITS + 0.5).int().long()
    share = torch.where(greedy, 0, each.tail[:, None]).long()
    stays = masses.gather(1, order).cumsum(1) > tail(masses.sum(1, keepdim=True), share)
    kept = kept & (torch.empty_like(kept).scatter_(1, order, stays) | (share == 0))
    return kept, torch.where(kept, weights, 0.0)


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
           temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, each: PerPicture | None = None
           ) -> torch.Tensor:
    """Tokens by the exponential race: the largest of weight / `philox.exponential`, of equals the first.

    The numbers are what `noise.exponential_` fills a buffer with, so that both ways draw the same but for rounding.

    Args:
        logits: float32 ``[pictures + guided, codes]``, ``scale``: float32 ``[guided]``, as `guided` takes them. A
            picture whose scale is up to 1 is drawn from its own logits alone.
        seeds, steps: int64 ``[pictures]``.
        temperature: above 0. top_k, top_p: restrict; 0 and 1 do not.
        each: of every picture its own, instead of these three.

    Returns:
        int64 ``[pictures]``.
    """
    pictures, count = len(seeds), len(scale)
    if each is None:
        each = PerPicture.same(pictures, temperature, top_k, top_p, logits.device)
    chosen = guided(logits, scale)
    chosen = torch.cat([torch.where(scale[:, None] > 1, chosen[:count], logits[:count]), chosen[count:]])
    kept, weights = warped(chosen, each)
    noise = philox.exponential(seeds, steps, logits.shape[1])
    race = torch.where(kept, weights / torch.where(each.temperature[:, None] == 0, 1.0, noise), -1.0)
    return (race == race.max(1, keepdim=True).values).int().argmax(1)
